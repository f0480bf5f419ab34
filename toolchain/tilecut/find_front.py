"""The Pareto front of points with a cost and a score, and its knee.

A point is on the front when no other one costs no more and scores no less, and is strictly better in one of the two. The
knee is where a step along the front begins to pay less: with costs and scores scaled to 0..1 between the ends of the
front, the point that lies highest above the chord from the cheapest to the best one (the offline form of Kneedle,
Satopaa et al. 2011, https://doi.org/10.1109/ICDCSW.2011.20, without its smoothing spline: the points are exact).
A front that bends the other way, or of two points, has none. The knee depends on the ends: another sweep, another knee.
"""

from __future__ import annotations

from collections.abc import Sequence

KNEE_METHOD = "the highest point above the chord of the front, both axes scaled to 0..1 (Kneedle, Satopaa et al. 2011)"
# A point that lies above the chord by rounding alone is no knee.
ABOVE = 1e-9


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, score) that no other one dominates, cheapest first; equal points stay together."""
    on_front = [i for i, one in enumerate(points) if not any(_dominates(other, one) for other in points)]
    return sorted(on_front, key=lambda i: points[i])


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def find_knee(points: Sequence[tuple[float, float]]) -> int | None:
    """The index of the knee among the points of a front; None where it has none."""
    if not points:
        return None
    (cheap, low), (dear, high) = min(points), max(points)
    if dear == cheap or high == low:
        return None
    above = [(score - low) / (high - low) - (cost - cheap) / (dear - cheap) for cost, score in points]
    best = max(range(len(points)), key=above.__getitem__)
    return best if above[best] > ABOVE else None
