"""Search: how many units each group keeps, from sizes that are legal for the target, within a budget.

Every group (or set of groups that share a contraction) offers options: a legal size for each, what it costs, and what
is lost. Widths fixed, costs and losses add up over the sets, so the choice is a multiple-choice knapsack, solved
exactly by `scipy.optimize.milp`. Shapes are never rounded afterwards: the lattice is the search space.

A long chain of layers without residuals is one set with more options than can be listed. It offers those on one way down
from all its units to the fewest, each step the one that loses least for what it saves; afterwards units are exchanged
between two of its groups as long as that loses less.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
# Options of a set that are all listed, and sizes of a group on the way down of a set that has more.
MOST_OPTIONS, MOST_STEPS = 200_000, 64

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

    def of(self, sets: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> float:
        """What several sets take of it."""
        return sum(self.cost(names, sizes) for names in sets)


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
    # A joined set is priced set by set: its costs add up.
    parts = [[names for names in sets if set(names) <= set(one)] for one in together]
    choices = [_choices(names, sizes, alike) for names in together]
    long = [i for i, one in enumerate(choices) if math.prod(map(len, one.values())) > MOST_OPTIONS]
    options = [
        _way_down(one, parts[i], curves, limits, inside)
        if i in long
        else _without_choice_in_removed(_every_option(one), sizes, inside)
        for i, one in enumerate(choices)
    ]
    losses = [[lost(curves, one, inside) for one in offered] for offered in options]
    costs = [
        [[limit.of(within, one) for one in offered] for within, offered in zip(parts, options)] for limit in limits
    ]
    _check_fits(limits, [limit.rest + sum(min(row) for row in rows) for limit, rows in zip(limits, costs)])
    chosen = _knapsack(losses, costs, [limit.limit - limit.rest for limit in limits])
    taken = [options[i][k] for i, k in enumerate(chosen)]
    room = [
        limit.limit - limit.rest - sum(rows[i][k] for i, k in enumerate(chosen)) for limit, rows in zip(limits, costs)
    ]
    for i in long:
        spent = [rows[i][chosen[i]] for rows in costs]
        within_set = [replace(limit, limit=left + own) for limit, left, own in zip(limits, room, spent)]
        taken[i] = _exchange(taken[i], choices[i], parts[i], curves, within_set, inside)
        room = [own.limit - own.of(parts[i], taken[i]) for own in within_set]
    found = {name: n for one in taken for name, n in one.items()}
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


def _choices(
    names: Sequence[str], sizes: Mapping[str, Sequence[int]], alike: Sequence[Sequence[str]]
) -> dict[tuple[str, ...], list[int]]:
    """The legal sizes of the named groups, ascending; groups that must be alike choose together."""
    classes = [tuple(n for n in one if n in set(names)) for one in alike]
    classes = [one for one in classes if one]
    classes += [(n,) for n in names if not any(n in one for one in classes)]
    offered = {}
    for one in classes:
        common = [n for n in sizes[one[0]] if all(n in sizes[other] for other in one)]
        if not common:
            raise ConfigError(
                "search",
                f"{one[0]} and {len(one) - 1} more must have equally many units, and no size is legal for all",
                fix="relax min_units and max_units, or leave uniform out",
            )
        offered[one] = common
    return offered


def _every_option(choices: Mapping[tuple[str, ...], Sequence[int]]) -> list[dict[str, int]]:
    """Every choice of sizes."""
    return [
        {name: n for one, n in zip(choices, chosen) for name in one} for chosen in itertools.product(*choices.values())
    ]


def _way_down(
    choices: Mapping[tuple[str, ...], Sequence[int]],
    sets: Sequence[Sequence[str]],
    curves: Mapping[str, Sequence[float]],
    limits: Sequence[Limit],
    within: Mapping[str, Sequence[str]],
) -> list[dict[str, int]]:
    """From the largest sizes to the smallest: what loses least for its share of the limits goes first."""
    left = {one: list(reversed(_thinned(offered)))[1:] for one, offered in choices.items()}
    now = {name: offered[-1] for one, offered in choices.items() for name in one}

    def share(option: Mapping[str, int]) -> float:
        return sum(limit.of(sets, option) / max(limit.limit, 1e-300) for limit in limits)

    taken, loss, found = share(now), lost(curves, now, within), [now]
    while left := {one: smaller for one, smaller in left.items() if smaller}:
        best: tuple[float, float, float, dict[str, int]] | None = None
        for one, smaller in left.items():
            option = {**now, **dict.fromkeys(one, smaller[0])}
            gone = {n for layer in now if option[layer] == 0 for n in within.get(layer, ())}
            # No choice is left of what is gone, but where it must be like another.
            option |= {n: offered[0] for names, offered in choices.items() if gone.issuperset(names) for n in names}
            its_share, its_loss = share(option), lost(curves, option, within)
            price = (its_loss - loss) / max(taken - its_share, 1e-300)
            if best is None or price < best[0]:
                best = price, its_share, its_loss, option
        assert best is not None
        _, taken, loss, now = best
        found.append(now)
        left = {one: [n for n in smaller if n < now[one[0]]] for one, smaller in left.items()}
    return found


def _exchange(
    option: dict[str, int],
    choices: Mapping[tuple[str, ...], Sequence[int]],
    sets: Sequence[Sequence[str]],
    curves: Mapping[str, Sequence[float]],
    limits: Sequence[Limit],
    within: Mapping[str, Sequence[str]],
) -> dict[str, int]:
    """One group grows and another shrinks for it, the pair that gains most, as long as the limits on this set hold."""
    steps = {one: _thinned(offered) for one, offered in choices.items() if not set(one) & within.keys()}

    def fits(one: Mapping[str, int]) -> bool:
        return all(limit.of(sets, one) <= limit.limit for limit in limits)

    def resized(one: dict[str, int], names: tuple[str, ...], size: int) -> dict[str, int]:
        return {**one, **dict.fromkeys(names, size)}

    def shrunk(grown: dict[str, int], kept: tuple[str, ...]) -> Iterator[dict[str, int]]:
        """Ways to bring it within the limits by one other group, or none."""
        if fits(grown):
            yield grown
            return
        for names in (one for one in steps if one != kept):
            # The largest first; costs fall with sizes.
            smaller = [resized(grown, names, n) for n in reversed(steps[names]) if n < grown[names[0]]]
            yield from smaller[bisect.bisect_left(smaller, True, key=fits) :][:1]

    while True:
        least, best = lost(curves, option, within), None
        for one, offered in steps.items():
            larger = [n for n in offered if n > option[one[0]]]
            # The next one, the second, the fourth, ..
            for size in (larger[(1 << i) - 1] for i in range(len(larger).bit_length())):
                for other in shrunk(resized(option, one, size), one):
                    if (loss := lost(curves, other, within)) < least - 1e-9 * abs(least):
                        least, best = loss, other
        if best is None:
            return option
        option = best


def _thinned(sizes: Sequence[int]) -> list[int]:
    """At most about MOST_STEPS of ascending sizes, the first and the last included."""
    step = -(-len(sizes) // MOST_STEPS)
    return sorted({*sizes[::step], sizes[-1]})


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
