import itertools
import random

import pytest

from tilecut.find_front import find_front, find_knee


def brute_force(points):
    """Indices of the points that no other one beats, by the definition."""
    beaten = {
        i
        for i, (cost, score) in enumerate(points)
        for other_cost, other_score in points
        if (other_cost <= cost and other_score > score) or (other_cost < cost and other_score >= score)
    }
    return set(range(len(points))) - beaten


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed):
    rng = random.Random(seed)
    # A small grid has ties and equal points.
    points = [(rng.randint(0, 9) / 2, rng.randint(0, 9) / 2) for _ in range(rng.randint(1, 30))]
    front = find_front(points)
    assert set(front) == brute_force(points) and len(front) == len(set(front))
    along = [points[i] for i in front]
    assert along == sorted(along)
    assert [score for _, score in along] == sorted(score for _, score in along)


def test_the_knee_is_the_bend_of_a_front():
    # y = 1 - exp(-x / 2) of ten steps lies highest above its chord where its slope is the chord's.
    points = [(x, 1 - 2.718281828 ** (-x / 2)) for x in range(11)]
    chord = points[-1][1] / 10
    slopes = [b[1] - a[1] for a, b in itertools.pairwise(points)]
    assert find_knee(points) == next(i for i, slope in enumerate(slopes) if slope < chord)


@pytest.mark.parametrize(("cost", "score"), [(1.0, 1.0), (1e9, 1e-3), (2.0, 700.0)])
def test_the_knee_knows_no_units(cost, score):
    points = [(1, 0.0), (2, 0.6), (3, 0.9), (6, 1.0)]
    assert find_knee([(7 + cost * x, score * y - 3) for x, y in points]) == 2


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1, 1)],
        [(1, 0), (2, 1)],
        [(1, 0), (2, 0.1), (3, 1)],
        [(1, 1), (2, 2), (3, 3)],
        [(1, 1), (1, 1)],
    ],
    ids=["none", "one", "two", "bent the other way", "straight", "equal"],
)
def test_a_front_without_a_bend_has_no_knee(points):
    assert find_knee(points) is None
