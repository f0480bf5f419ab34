"""Mask: a plan as 0/1 multiplications at the gates of the dense graph. The reference that `prune` is compared with.

A gate is the activation at a sink of the group: the operand that the next op contracts. Multiplying there by 0 removes
the unit exactly, whatever the function before it makes of zero. Where statistics run over the units, they run over those
that stay (`mask_norms.py`). Units that compete win nothing (`close_contests.py`), and words of a vocabulary are read as
another (`remap_ids.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.expert_rows import ExpertRows
from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import Axes, Sink, infer
from tilecut_passes.axes.selection import Selection
from tilecut_passes.close_contests import close_contests
from tilecut_passes.graph import Graph, value_of
from tilecut_passes.mask_norms import restrict_statistics
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import open_hidden
from tilecut_passes.remap_ids import remap_lookups, widen_outputs

aten = torch.ops.aten


@dataclass(frozen=True)
class Mask:
    """Apply a plan to the dense graph; nothing changes its shape."""

    plan: PrunePlan

    def __call__(self, graph: Graph) -> int:
        """Insert what masks; returns how many calls."""
        open_hidden(graph, self.plan)
        axes = infer(graph)
        selection = select_plan(graph, self.plan, axes)
        count = close_contests(axes, selection)
        count += remap_lookups(axes, selection, masked=True) + widen_outputs(axes, selection, masked=True)
        for i, sink in enumerate(axes.sinks):
            if not selection.loses(sink.axis):
                continue
            value = sink.source.meta["val"]
            mask = selection.kept_mask(sink.axis).to(value.dtype)
            gate = graph.add_tensor(f"tilecut_mask_{i}", mask.reshape(along(sink.dim, value.ndim)))
            multiply_at(graph, sink, gate)
            count += 1
        return count + restrict_statistics(axes, selection)


def select_plan(graph: Graph, plan: PrunePlan, axes: Axes) -> Selection:
    """The units that a plan keeps, without its padding."""
    matched = plan.matched(graph, find_groups(axes))
    stand_ins = {group.axis: planned.unknown for group, planned in matched if planned.unknown is not None}
    cut = {g.axis: p.kept for g, p in matched if p.kept != tuple(range(g.size))}
    return Selection(cut, stand_ins)


def multiply_at(graph: Graph, sink: Sink, factor: fx.Node) -> fx.Node:
    """Multiply what the sink contracts by `factor`."""
    with graph.fx.inserting_before(sink.node):
        times = graph.fx.call_function(aten.mul.Tensor, (sink.source, factor))
    sink.node.update_arg(sink.argument, times)
    return times


def multiply_rows(graph: Graph, rows: ExpertRows, factors: fx.Node, unit: fx.Node) -> None:
    """Multiply the rows of every expert by the factor of the unit that it is: `factors[unit[e]]`."""
    users = list(rows.node.users)
    rank = value_of(rows.node).ndim
    with graph.fx.inserting_after(rows.node):
        count = graph.fx.call_function(aten.sym_size.int, (rows.node, 0))
    with graph.fx.inserting_after(count):
        places = graph.fx.call_function(aten.arange.default, (count,), {"dtype": value_of(rows.ends).dtype})
    with graph.fx.inserting_after(places):
        expert = graph.fx.call_function(aten.searchsorted.Tensor, (rows.ends, places), {"right": True})
    with graph.fx.inserting_after(expert):
        owner = graph.fx.call_function(aten.index_select.default, (unit, 0, expert))
    with graph.fx.inserting_after(owner):
        factor = graph.fx.call_function(aten.index_select.default, (factors, 0, owner))
    with graph.fx.inserting_after(factor):
        column = graph.fx.call_function(aten.reshape.default, (factor, along(0, rank)))
    with graph.fx.inserting_after(column):
        times = graph.fx.call_function(aten.mul.Tensor, (rows.node, column))
    for user in users:
        user.replace_input_with(rows.node, times)


def along(dim: int, rank: int) -> list[int]:
    """The shape of a vector that broadcasts along one dimension."""
    return [-1 if d == dim else 1 for d in range(rank)]


def unit_of(axis: Axis, leaf: Axis) -> Tensor:
    """For every index of a static axis, which unit of `leaf` it belongs to; `leaf.size` where it belongs to none."""
    axis = axis.root
    if axis is leaf:
        return torch.arange(int(leaf.size))
    if axis.is_leaf:
        return torch.full((int(axis.size),), int(leaf.size))
    if axis.is_concat:
        return torch.cat([unit_of(p, leaf) for p in axis.pieces])
    unit = torch.full((1,), int(leaf.size))
    for factor in axis.factors:
        inner = unit_of(factor, leaf)
        unit = torch.minimum(unit[:, None].expand(-1, len(inner)), inner[None]).flatten()
    return unit


@dataclass(frozen=True)
class GatedGraph:
    """A graph whose groups are multiplied by vectors that the caller gives at run time, one input a group."""

    graph: Graph
    groups: tuple[Group, ...]

    def run(self, inputs: Mapping[str, Tensor], gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Execute with a vector [group.size] for every group's name; differentiable in them."""
        return self.graph.differentiable({**inputs, **{f"gate:{g.name}": gates[g.name] for g in self.groups}})

    def open_gates(self, requires_grad: bool = False) -> dict[str, Tensor]:
        """Vectors of ones: the dense model."""
        device = next(iter(self.graph.tensors.values())).device
        return {g.name: torch.ones(g.size, device=device, requires_grad=requires_grad) for g in self.groups}


def gate(dense: Graph, names: list[str]) -> GatedGraph:
    """A copy of the graph in which the named groups' gates are inputs."""
    graph = dense.copy()
    axes = infer(graph)
    groups = tuple(g for g in find_groups(axes) if g.name in set(names))
    first = graph.first_call()
    last_input = graph.placeholders[-1]
    for i, group in enumerate(groups):
        with graph.fx.inserting_after(last_input):
            last_input = vector = graph.fx.placeholder(f"tilecut_gate_{i}")
        graph.inputs += (f"gate:{group.name}",)
        with graph.fx.inserting_before(first):
            # Indices that are no unit of the group read the 1 that is appended.
            extended = graph.fx.call_function(aten.constant_pad_nd.default, (vector, [0, 1], 1.0))
        for j, sink in enumerate(group.gates):
            unit = graph.add_tensor(f"tilecut_unit_{i}_{j}", unit_of(sink.axis, group.axis))
            types = axes.of[sink.source]
            with graph.fx.inserting_before(sink.node):
                factor = graph.fx.call_function(aten.index_select.default, (extended, 0, unit))
                factor = graph.fx.call_function(aten.reshape.default, (factor, along(sink.dim, len(types))))
            # A later group at the same sink multiplies the product, which is typed like its source.
            axes.of[multiply_at(graph, sink, factor)] = types
        for j, rows in enumerate(group.rows):
            unit = graph.add_tensor(f"tilecut_expert_{i}_{j}", unit_of(rows.axis, group.axis))
            multiply_rows(graph, rows, extended, unit)
    graph.clean()
    return GatedGraph(graph, groups)
