"""Mask search by diagonal Fisher information, for a budget of MACs (or any counted resource) or of latency.

Before: scores of units and legal sizes of groups. After: how many of its most important units every group keeps.
Kwon et al., A Fast Post-Training Pruning Framework for Transformers, arXiv 2204.09656, algorithm 1: for every number of
attention heads, most important first over the whole model, what is left of the budget goes to the most important
filters; the split with the least importance lost is taken.

Here a group may only have legal sizes, so what is taken is a step from one legal size of a group to the next. A step is
as important as its units are on average. With block 1 a step is a unit, and where units of a class cost the same this
is the paper's algorithm, except that every group keeps its smallest legal size (in the paper a layer may vanish). Where
costs differ the order is still that of importance, and what a next step no longer fits is filled with later ones.

For latency (section 4.1 there) each group's curve is fitted by a constant up to a threshold and a line beyond it: units
up to the threshold are free. What is found is checked with the true costs, which it never exceeds: where the fit was
optimistic the search is repeated with less, where it was pessimistic further steps are taken while they fit.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from tilecut_passes.axes.groups import Group
from tilecut_passes.search import Limit
from tilecut_runtime.errors import ConfigError

# The paper's heads; every other group is filters.
ATTENTION = frozenset({"heads", "kv_groups", "queries"})


@dataclass(frozen=True)
class Step:
    """`units` more of a group, up to its next legal size: `gain` is their importance, `rank` their mean importance."""

    group: str
    units: int
    size: int
    gain: float
    rank: float


@dataclass(frozen=True)
class LatencyFit:
    """A latency that is `constant` up to `threshold` units, and rises by `slope` with each further one."""

    threshold: int
    constant: float
    slope: float

    def at(self, count: int) -> float:
        """The latency of `count` units."""
        return self.constant + self.slope * max(count - self.threshold, 0)


def search_macs(
    groups: Sequence[Group],
    sets: Sequence[Sequence[str]],
    scores: Mapping[str, Tensor],
    sizes: Mapping[str, Sequence[int]],
    limits: Sequence[Limit],
) -> dict[str, int]:
    """How many units every group keeps within every limit, by the mask search of Kwon et al.

    Args:
        groups: the groups to choose for.
        sets: their names, split so that sets share no cost (see `MacCounter.groups_together`).
        scores: group name -> the importance of every unit (the diagonal of its Fisher information).
        sizes: group name -> its legal sizes, ascending: one where it is given, within minimum and maximum.
        limits: what must hold; costs must not fall where a group grows.

    Raises:
        ConfigError: a limit is below the smallest legal model; names the smallest reachable.
    """
    costs = _Costs(sets, limits)
    costs.check({g.name: sizes[g.name][0] for g in groups})
    return _search(groups, scores, sizes, costs, costs)


def search_latency(
    groups: Sequence[Group],
    sets: Sequence[Sequence[str]],
    scores: Mapping[str, Tensor],
    sizes: Mapping[str, Sequence[int]],
    latency: Limit,
    limits: Sequence[Limit] = (),
) -> dict[str, int]:
    """Like `search_macs` for a latency, whose curves are fitted as the paper does; `limits` hold besides it."""
    true = _Costs(sets, [latency, *limits])
    true.check({g.name: sizes[g.name][0] for g in groups})
    fits = _fit_sets(sets, sizes, latency)
    free = {g.name: [n for n in sizes[g.name] if n >= fits[g.name].threshold] for g in groups}
    smallest = {name: legal[0] for name, legal in free.items()}
    largest = {name: legal[-1] for name, legal in sizes.items()}

    def predicted(names: Sequence[str], counts: Mapping[str, int]) -> float:
        """The fitted latency of a set; groups that share a cost scale one another."""
        product = math.prod(fits[name].at(counts[name]) for name in names)
        return product / max(latency.cost(names, largest), 1e-300) ** (len(names) - 1)

    fitted = replace(latency, cost=predicted)
    while (costs := _Costs(sets, [fitted, *limits])).fit(smallest):
        found = _search(groups, scores, free, costs, true)
        excess = true.taken(0, found) - latency.limit
        if excess <= 0:
            return found
        fitted = replace(fitted, limit=fitted.limit - max(excess, 1e-3 * abs(latency.limit)))
    # The units that the fit calls free do not fit the budget, so they are priced one by one.
    return _search(groups, scores, sizes, true, true)


def _search(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    sizes: Mapping[str, Sequence[int]],
    costs: _Costs,
    true: _Costs,
) -> dict[str, int]:
    """The best split within `costs`, then further steps while they fit `true`."""
    heads = _Path([g for g in groups if g.kind in ATTENTION], scores, sizes)
    filters = _Path([g for g in groups if g.kind not in ATTENTION], scores, sizes)
    best, split = -math.inf, (0, 0)
    most = len(filters.steps)
    for n in range(len(heads.steps) + 1):
        kept = heads.at(n)
        if not costs.fit(kept | filters.at(0)):
            break
        # More heads leave room for no more filters than fewer did.
        most = bisect.bisect_right(range(1, most + 1), False, key=lambda k: not costs.fit(kept | filters.at(k)))
        gain = heads.gains[n] + filters.gains[most]
        if gain > best:
            best, split = gain, (n, most)
    chosen = heads.at(split[0]) | filters.at(split[1])
    chosen = _take_while_fit(chosen, [*filters.steps[split[1] :], *heads.steps[split[0] :]], true)
    return {g.name: chosen[g.name] for g in groups}


def _take_while_fit(chosen: dict[str, int], steps: Sequence[Step], costs: _Costs) -> dict[str, int]:
    """Every step that still fits, in order; a group whose step does not takes no later one."""
    full: set[str] = set()
    for step in steps:
        if step.group in full:
            continue
        grown = {**chosen, step.group: step.size}
        if costs.fit(grown):
            chosen = grown
        else:
            full.add(step.group)
    return chosen


class _Path:
    """The steps of some groups in the order in which they are taken, most important first."""

    def __init__(self, groups: Sequence[Group], scores: Mapping[str, Tensor], sizes: Mapping[str, Sequence[int]]):
        self.names = [g.name for g in groups]
        steps = [step for g in groups for step in _steps(g.name, scores[g.name], sizes[g.name])]
        self.steps = sorted(steps, key=lambda step: -step.rank)
        self.gains = np.cumsum([0.0, *(step.gain for step in self.steps)])
        column = {name: i for i, name in enumerate(self.names)}
        grown = np.zeros((len(steps) + 1, len(groups)), dtype=np.int32)
        grown[0] = [sizes[name][0] for name in self.names]
        for i, step in enumerate(self.steps):
            grown[i + 1, column[step.group]] = step.units
        self.sizes = grown.cumsum(0, dtype=np.int32)

    def at(self, count: int) -> dict[str, int]:
        """The groups' sizes after `count` steps."""
        return dict(zip(self.names, self.sizes[count].tolist()))


def _steps(name: str, scores: Tensor, sizes: Sequence[int]) -> list[Step]:
    """The steps between a group's legal sizes; a later one never ranks above an earlier one, rounding included."""
    best = scores.double().sort(descending=True).values
    steps = []
    rank = math.inf
    for before, size in itertools.pairwise(sizes):
        gain = float(best[before:size].sum())
        rank = min(rank, gain / (size - before))
        steps.append(Step(name, size - before, size, gain, rank))
    return steps


class _Costs:
    """What sizes take of every limit; the cost of a set is asked for once per sizes."""

    def __init__(self, sets: Sequence[Sequence[str]], limits: Sequence[Limit]):
        self.sets = [tuple(names) for names in sets]
        self.limits = limits
        self.known: dict[tuple[int, tuple[str, ...], tuple[int, ...]], float] = {}

    def taken(self, index: int, sizes: Mapping[str, int]) -> float:
        """What the groups at these sizes take of a limit, with the rest of the model."""
        limit = self.limits[index]
        total = limit.rest
        for names in self.sets:
            counts = tuple(sizes[name] for name in names)
            key = (index, names, counts)
            if key not in self.known:
                self.known[key] = limit.cost(names, dict(zip(names, counts)))
            total += self.known[key]
        return total

    def fit(self, sizes: Mapping[str, int]) -> bool:
        """Whether every limit holds."""
        return all(self.taken(i, sizes) <= limit.limit for i, limit in enumerate(self.limits))

    def check(self, smallest: Mapping[str, int]) -> None:
        """Refuse limits that not even these sizes meet."""
        for i, limit in enumerate(self.limits):
            if (least := self.taken(i, smallest)) > limit.limit:
                raise ConfigError(
                    "search",
                    f"no legal model fits the budget of {_shown(limit.limit)} {limit.what}",
                    got=f"the smallest legal one has {_shown(least)}",
                    fix="raise the budget to at least that, or allow smaller sizes",
                )


def _shown(amount: float) -> str:
    """An amount to three decimals, rounded up, so that what is shown can be asked for."""
    return f"{math.ceil(amount * 1000) / 1000:,.15g}"


def fit_latency(sizes: Sequence[int], latencies: Sequence[float]) -> LatencyFit:
    """The constant and line that fit a latency curve best in least squares; thresholds are its sizes."""
    x, y = np.asarray(sizes, dtype=float), np.asarray(latencies, dtype=float)
    best, found = math.inf, LatencyFit(int(sizes[0]), float(y.mean()), 0.0)
    for head in range(1, len(x) + 1):
        constant = y[:head].mean()
        along, above = x[head:] - x[head - 1], y[head:] - constant
        slope = max(float(along @ above) / float(along @ along), 0.0) if len(along) else 0.0
        error = ((y[:head] - constant) ** 2).sum() + ((above - slope * along) ** 2).sum()
        if error < best:
            best, found = error, LatencyFit(int(sizes[head - 1]), float(constant), slope)
    return found


def _fit_sets(
    sets: Sequence[Sequence[str]], sizes: Mapping[str, Sequence[int]], latency: Limit
) -> dict[str, LatencyFit]:
    """A fit for every group, the others of its set at their largest."""
    fits = {}
    for names in sets:
        whole = {name: sizes[name][-1] for name in names}
        for name in names:
            fits[name] = fit_latency(sizes[name], [latency.cost(names, {**whole, name: n}) for n in sizes[name]])
    return fits
