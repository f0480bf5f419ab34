"""Cut: one of the two interpretations of a plan. `mask` is the other, and they must agree.

Before: a graph. After: the units that the plan does not keep are gone from every tensor that held them, and kept ones
stand in the plan's order, followed by zeros where the plan pads. Left alone: groups that the plan keeps whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tilecut_passes.axes.branches import remove_branches
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.axes.selection import PAD, Selection
from tilecut_passes.graph import Graph
from tilecut_passes.plan import GroupPlan, PrunePlan
from tilecut_passes.project_outputs import ProjectOutputs
from tilecut_passes.remap_ids import LEAST
from tilecut_passes.rotate_hidden import RotateHidden
from tilecut_passes.select_units import select_states, select_units
from tilecut_runtime.errors import PlanError


@dataclass(frozen=True)
class Prune:
    """Apply a plan by slicing. Not idempotent: the cut graph is another model, and the plan will say so."""

    plan: PrunePlan

    def __call__(self, graph: Graph) -> int:
        """Cut the graph in place; returns the number of tensors that changed.

        Raises:
            PlanError: the plan is not of this graph.
        """
        open_hidden(graph, self.plan)
        axes = infer(graph)
        units, stand_ins = {}, {}
        for group, planned in self.plan.matched(graph, find_groups(axes)):
            chosen = kept(planned)
            if chosen != list(range(group.size)):
                units[group.axis] = chosen
            if planned.unknown is not None:
                stand_ins[group.axis] = planned.unknown
        changed = select_units(axes, Selection(units, stand_ins)) if units else 0
        removed = [branch for branch in axes.branches if branch.axis in units]
        remove_branches(graph, removed)
        return changed + len(removed)


def open_hidden(graph: Graph, plan: PrunePlan) -> None:
    """What a plan of the hidden width was made with, where it is not there yet: layers behind outputs, and another basis.

    Raises:
        PlanError: the graph's hidden width is in another basis than the plan's units.
    """
    if any(planned.kind == "hidden" for planned in plan.groups) and ProjectOutputs()(graph):
        graph.clean()
        graph.propagate()
    if turned := [name for name in graph.rotated if name not in plan.rotations]:
        raise PlanError("PrunePlan", f"the plan is of the model's own channels, and {turned[0]} has been turned")
    RotateHidden(plan.rotations)(graph)


def as_cut(dense: Graph, plan: PrunePlan) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function from the dense graph's inputs or outputs to those of the cut graph.

    A key-value cache loses heads too, and no word that went is likely.
    """
    smaller = any(g.kind == "vocab" and len(g.kept) < g.size for g in plan.groups)
    if not dense.states and not smaller:
        return dict
    axes = infer(dense)
    selection = Selection({group.axis: kept(planned) for group, planned in plan.matched(dense, find_groups(axes))})
    went = {name: ~selection.kept_mask(axis) for name, axis in axes.returned if selection.touches(axis)} if smaller else {}

    def cut(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = select_states(axes, selection, tensors)
        return out | {name: out[name].masked_fill(gone, LEAST) for name, gone in went.items() if name in out}

    return cut


def kept(planned: GroupPlan) -> list[int]:
    """The old index of every unit that a group has afterwards; PAD where it is new."""
    return [*planned.kept, *[PAD] * (planned.count - len(planned.kept))]
