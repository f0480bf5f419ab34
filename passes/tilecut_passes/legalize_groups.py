"""What the enforce passes share: bring groups to legal sizes, in a graph or in a plan, by padding or by cutting.

Padding is exact: new units have zero weights and zero biases on both sides of the gate, and the softmax scale is the
dense one, so the numbers stay. Cutting drops the units of least magnitude, so the numbers become those of the masked
graph. Which group is illegal and what size it should have is the pass's own `wanted_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import Axes, infer
from tilecut_passes.axes.selection import PAD, Selection
from tilecut_passes.graph import Graph
from tilecut_passes.plan import GroupPlan, PrunePlan
from tilecut_passes.score import score
from tilecut_passes.select_units import select_units
from tilecut_runtime.errors import ConfigError

How = Literal["pad", "cut"]


@dataclass(frozen=True)
class LegalizeGroups:
    """Base of the enforce passes. Idempotent: a legal graph is left alone."""

    how: How = "pad"

    def __post_init__(self) -> None:
        if self.how not in ("pad", "cut"):
            raise ConfigError(
                type(self).__name__, "unknown way to reach a legal size", got=repr(self.how), wanted="'pad' or 'cut'"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of group that the pass looks at."""
        raise NotImplementedError

    def wanted_size(self, axes: Axes, group: Group, count: int) -> int:
        """The legal size for a group that now has `count` units."""
        raise NotImplementedError

    def __call__(self, graph: Graph) -> int:
        """Legalize a graph in place; returns the number of groups that changed."""
        axes = infer(graph)
        changed = [
            (g, n)
            for g in find_groups(axes)
            if g.kind in self.kinds and (n := self.wanted_size(axes, g, g.size)) != g.size
        ]
        units = {}
        for group, n in changed:
            if n > group.size:
                units[group.axis] = [*range(group.size), *[PAD] * (n - group.size)]
            else:
                units[group.axis] = list(score("magnitude", graph, [group], [])[group.name].best(n))
        if units:
            select_units(axes, Selection(units))
        return len(units)

    def on_plan(self, plan: PrunePlan, graph: Graph) -> PrunePlan:
        """The plan with this rule kept: for the dense `graph`, groups of the plan and groups that it leaves whole.

        A group that the plan already pads to a legal size is left alone.
        """
        axes = infer(graph)
        planned = {g.name: g for g in plan.groups}
        out = dict(planned)
        for group in find_groups(axes):
            if group.kind not in self.kinds:
                continue
            now = planned.get(group.name) or GroupPlan(
                group.name, group.kind, group.size, tuple(range(group.size)), group.members
            )
            n = self.wanted_size(axes, group, now.count)
            if n > now.count:
                out[group.name] = replace(now, padded_to=n)
            elif n < now.count:
                out[group.name] = replace(now, kept=_cut_further(graph, group, now.kept, n), padded_to=None)
        order = {g.name: i for i, g in enumerate(find_groups(axes))}
        return replace(plan, groups=tuple(sorted(out.values(), key=lambda g: order.get(g.name, -1))))


def _cut_further(graph: Graph, group: Group, kept: Sequence[int], count: int) -> tuple[int, ...]:
    """The `count` units of largest magnitude among those kept."""
    order = score("magnitude", graph, [group], [])[group.name].order
    return tuple(sorted([unit for unit in order if unit in set(kept)][-count:]))


def round_to(count: int, multiple: int, how: How) -> int:
    """The nearest multiple in the direction asked for; never below one multiple."""
    return -(-count // multiple) * multiple if how == "pad" else max(count // multiple, 1) * multiple
