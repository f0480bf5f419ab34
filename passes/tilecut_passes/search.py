"""Search: how many units each group keeps, from sizes that are legal for the target, within a budget.

Every group (or set of groups that share a contraction) offers options: a legal size for each, what it costs, and what
is lost. Widths fixed, costs and losses add up over the sets, so the choice is a multiple-choice knapsack, solved
exactly by `scipy.optimize.milp`. Shapes are never rounded afterwards: the lattice is the search space.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from tilecut_passes.axes.groups import Group, fewest
from tilecut_runtime.errors import ConfigError


@dataclass(frozen=True)
class Lattice:
    """Which sizes a target allows.

    Attributes:
        blocks: kind -> sizes must be multiples of this. The dense size is always legal.
        powers_of_two: kinds whose sizes must be powers of two.
        smallest: kind -> the fewest units that a group may keep.
        padded: kind -> a dense size that is no multiple of this is emitted padded to the next one.
    """

    blocks: Mapping[str, int]
    powers_of_two: frozenset[str] = frozenset()
    smallest: Mapping[str, int] | None = None
    padded: Mapping[str, int] | None = None

    def emitted(self, kind: str, count: int) -> int:
        """How many units a group that keeps `count` has once it is legal, padding included: what it costs."""
        if kind in self.powers_of_two:
            count = 1 << (count - 1).bit_length()
        block = (self.padded or {}).get(kind, 1)
        return -(-count // block) * block

    def sizes(self, kind: str, size: int) -> list[int]:
        """The legal sizes of a group, the dense one included, ascending. A residual branch is there or not."""
        block = self.blocks.get(kind, 1)
        least = max((self.smallest or {}).get(kind, 0), fewest(kind))
        legal = [n for n in range(0, size, block) if n >= least]
        if kind in self.powers_of_two:
            legal = [n for n in legal if n & (n - 1) == 0]
        return [*legal, size]

    def allows(self, kind: str, size: int, dense: int) -> bool:
        """Whether a group of `dense` units may have `size`."""
        return size == dense or size in self.sizes(kind, dense)

    def describe(self) -> str:
        """The lattice in words, for reports."""
        blocks = [
            f"{kind} in multiples of {n}" if n > 1 else f"any count of {kind}"
            for kind, n in sorted(self.blocks.items())
        ]
        return ", ".join(blocks + [f"{kind} a power of two" for kind in sorted(self.powers_of_two)])


# Of the losses that the solver's answer may exceed the best one by, and branches that it looks at.
OPTIMALITY_GAP, MOST_NODES = 1e-3, 200

Cost = Callable[[Sequence[str], Mapping[str, int]], float]


@dataclass(frozen=True)
class Limit:
    """An upper limit on a resource. `cost(names, sizes)` is what the named groups take of it at those sizes.

    `rest` is what the limit covers besides the groups: it cannot be cut.
    """

    what: str
    limit: float
    cost: Cost
    rest: float = 0.0


def search(
    groups: Sequence[Group],
    sets: Sequence[Sequence[str]],
    curves: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[int]],
    limits: Sequence[Limit],
    alike: Sequence[Sequence[str]] = (),
    within: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, int]:
    """How many units every group keeps: legal, within every limit, and losing least.

    Args:
        groups: the groups to choose for.
        sets: their names, split so that sets share no cost (see `MacCounter.groups_together`).
        curves: group name -> importance lost when only k units stay, for k = 0..size.
        sizes: group name -> its legal sizes, ascending (see `legal_sizes`).
        alike: groups that keep equally many units.
        within: name of a residual branch -> the groups that go with it, at no loss of their own.

    Raises:
        ConfigError: a limit is below the smallest legal model (names the smallest reachable), or groups that must be
            alike share no size.
    """
    if not groups:
        _check_fits(limits, [limit.rest for limit in limits])
        return {}
    together = joined(sets, alike)
    inside = within or {}
    options = [_without_choice_in_removed(_options(names, sizes, alike), sizes, inside) for names in together]
    losses = [[lost(curves, one, inside) for one in offered] for offered in options]
    # A joined set is priced set by set: its costs add up.
    parts = [[names for names in sets if set(names) <= set(one)] for one in together]
    costs = [
        [[sum(limit.cost(names, one) for names in within) for one in offered] for within, offered in zip(parts, options)]
        for limit in limits
    ]
    _check_fits(limits, [limit.rest + sum(min(row) for row in rows) for limit, rows in zip(limits, costs)])
    chosen = _knapsack(losses, costs, [limit.limit - limit.rest for limit in limits])
    found = {name: n for offered, i in zip(options, chosen) for name, n in offered[i].items()}
    return {group.name: found[group.name] for group in groups}


def _check_fits(limits: Sequence[Limit], least: Sequence[float]) -> None:
    """Whether the smallest legal model is within every limit."""
    for limit, smallest in zip(limits, least, strict=True):
        if smallest > limit.limit:
            raise ConfigError(
                "search",
                f"no legal model fits the budget of {shown(limit.limit)} {limit.what}",
                got=f"the smallest legal one has {shown(smallest)}",
                fix="raise the budget to at least that, or allow smaller sizes",
            )


def lost(curves: Mapping[str, Sequence[float]], sizes: Mapping[str, int], within: Mapping[str, Sequence[str]]) -> float:
    """What is lost at some sizes: what a removed branch takes along loses nothing more."""
    gone = {name for layer, inner in within.items() if sizes.get(layer) == 0 for name in inner}
    return sum(curves[name][n] for name, n in sizes.items() if name not in gone)


def _without_choice_in_removed(
    offered: list[dict[str, int]], sizes: Mapping[str, Sequence[int]], within: Mapping[str, Sequence[str]]
) -> list[dict[str, int]]:
    """Options of groups in a removed branch are all one: the one at the smallest sizes is left."""
    return [
        one
        for one in offered
        if all(
            one[name] == sizes[name][0]
            for layer, inner in within.items()
            if one.get(layer) == 0
            for name in inner
            if name in one
        )
    ]


def shown(amount: float) -> str:
    """An amount for people: whole numbers with separators, small ones with three digits."""
    return f"{amount:,.0f}" if amount >= 1000 or float(amount).is_integer() else f"{amount:.3g}"


def joined(sets: Sequence[Sequence[str]], alike: Sequence[Sequence[str]]) -> list[list[str]]:
    """Sets of names, those with groups that must be alike made one."""
    out = [list(names) for names in sets]
    for names in alike:
        met = [one for one in out if set(one) & set(names)]
        out = [one for one in out if one not in met] + [[n for one in met for n in one]]
    return out


def _options(
    names: Sequence[str], sizes: Mapping[str, Sequence[int]], alike: Sequence[Sequence[str]]
) -> list[dict[str, int]]:
    """Every choice of sizes for the named groups; groups that must be alike choose together."""
    classes = [[n for n in one if n in set(names)] for one in alike]
    classes = [one for one in classes if one]
    classes += [[n] for n in names if not any(n in one for one in classes)]
    offered = []
    for one in classes:
        common = [n for n in sizes[one[0]] if all(n in sizes[other] for other in one)]
        if not common:
            raise ConfigError(
                "search",
                f"{one[0]} and {len(one) - 1} more must have equally many units, and no size is legal for all",
                fix="relax min_units and max_units, or leave uniform out",
            )
        offered.append(common)
    return [
        {name: n for one, n in zip(classes, chosen) for name in one} for chosen in itertools.product(*offered)
    ]


def _knapsack(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[Sequence[float]]], limits: Sequence[float]
) -> list[int]:
    """One option from every row, losing least, within every limit."""
    widths = [len(row) for row in losses]
    starts = list(itertools.accumulate(widths, initial=0))
    flat = np.array(list(itertools.chain.from_iterable(losses)), dtype=float)
    one_each = csr_array(
        (np.ones(len(flat)), (np.repeat(np.arange(len(widths)), widths), np.arange(len(flat)))),
        shape=(len(widths), len(flat)),
    )
    constraints = [LinearConstraint(one_each, 1, 1)]
    for rows, limit in zip(costs, limits):
        row = np.array(list(itertools.chain.from_iterable(rows)), dtype=float)
        unit = max(float(row.max()), 1.0)
        constraints.append(LinearConstraint(row[None] / unit, -np.inf, limit / unit))
    scale = max(float(np.abs(flat).max()), 1e-300)
    found = milp(
        flat / scale,
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        # Losses are estimates: where many layers are alike, the last digits would take hours to prove. Nodes and not
        # seconds are counted, so that the answer is the same on every machine.
        options={"mip_rel_gap": OPTIMALITY_GAP, "node_limit": MOST_NODES},
    )
    if found.x is None:
        raise ConfigError(
            "search",
            f"the solver found no plan within all budgets together ({found.message})",
            fix="raise a budget, or relax a constraint",
        )
    return [int(np.argmax(found.x[start : start + width])) for start, width in zip(starts, widths)]
