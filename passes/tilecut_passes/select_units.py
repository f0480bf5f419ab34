"""Give every group other units: slice what holds them and rewrite the sizes that name them. Cutting and padding are this.

Before: a graph and a selection (leaf -> the units that stay, -1 for a new unit of zeros).
After:
    - parameters and buffers hold the selected slices, under the same names;
    - tensors made in the graph, and constants where they enter an op, are selected from;
    - the literals of reshape, expand, split, slice and norms say the new sizes;
    - inputs that hold a key-value cache have the new sizes;
    - constants that indices are compared with have the new numbers, and so have rows that the caller's ids choose: outputs
      along such rows get their full width back (`remap_ids.py`).
Left alone: everything that no selected leaf is part of; the caller's tensors (new ones are made).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from tilecut_passes.axes.axis import Axis, product
from tilecut_passes.axes.infer import Axes
from tilecut_passes.axes.rules import RESIZE
from tilecut_passes.axes.selection import Selection, take
from tilecut_passes.graph import value_of
from tilecut_passes.remap_ids import remap_lookups, widen_outputs

aten = torch.ops.aten


def select_units(axes: Axes, selection: Selection) -> int:
    """Rewrite `axes.graph` in place; returns how many tensors changed. Types in `axes` are stale afterwards."""
    graph = axes.graph
    before = list(graph.nodes)
    count = 0
    for name, types in axes.tensors.items():
        tensor = graph.tensor(name)
        chosen = tensor.detach()
        for dim, axis in enumerate(types):
            if selection.touches(axis):
                chosen = take(chosen, dim, selection.indices(axis))
        if chosen.shape != tensor.shape or chosen.data_ptr() != tensor.data_ptr():
            graph.set_tensor(
                name, nn.Parameter(chosen, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else chosen
            )
            count += 1
    for name in graph.states:
        node = graph.input_node(name)
        if node is not None and any(map(selection.touches, axes.of[node])):
            _resize_state(axes, selection, node)
            count += 1
    # Literals first: their rules read the arguments that inference typed.
    for node in before:
        resize = RESIZE.get(node.target) if node.op == "call_function" else None
        if resize is not None:
            resize(axes, node, selection)
    for node in axes.makers:
        for dim, axis in enumerate(axes.of[node]):
            if selection.touches(axis):
                users = list(node.users)
                picked = _select_in_graph(axes, selection, node, dim, axis, before=node.next)
                for user in users:
                    user.replace_input_with(node, picked)
    for border in axes.borders:
        here = border.source
        for dim, axis in enumerate(border.axes):
            if selection.touches(axis):
                picked = _select_in_graph(axes, selection, here, dim, axis, before=border.user)
                border.user.replace_input_with(here, picked)
                here = picked
        into = axes.numbers.get((border.user, border.source))
        if into is not None and selection.touches(into):
            border.user.replace_input_with(here, _renumber(axes, selection, into, here, border.user))
    return count + remap_lookups(axes, selection, masked=False) + widen_outputs(axes, selection, masked=False)


def _renumber(axes: Axes, selection: Selection, into: Axis, numbers: fx.Node, user: fx.Node) -> fx.Node:
    """A call that gives old indices into an axis their new numbers, -1 for those that went."""
    table = axes.graph.add_tensor(f"tilecut_numbers_{user.name}", selection.places(into))
    with axes.graph.fx.inserting_before(user):
        return axes.graph.fx.call_function(aten.index.Tensor, (table, [numbers]))


def _resize_state(axes: Axes, selection: Selection, node: fx.Node) -> None:
    value = value_of(node)
    shape = [
        selection.count(axis) if selection.touches(axis) else size
        for axis, size in zip(axes.of[node], value.shape, strict=True)
    ]
    with axes.graph.fake_mode():
        node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)


def select_states(axes: Axes, selection: Selection, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense inputs or outputs as the cut graph has them: of a key-value cache, the units that stay."""
    graph = axes.graph
    types = {name: axes.of[node] for name in graph.states if (node := graph.input_node(name)) is not None}
    types |= {name: axes.of[r] for name, r in zip(graph.outputs, graph.results) if name in graph.states.values()}
    out = dict(tensors)
    for name in out.keys() & types.keys():
        for dim, axis in enumerate(types[name]):
            if selection.touches(axis):
                out[name] = take(out[name], dim, selection.indices(axis))
    return out


def _select_in_graph(axes: Axes, selection: Selection, node: fx.Node, dim: int, axis: Axis, before: fx.Node) -> fx.Node:
    """A call that selects from `node` along `dim`; a mixed axis (batch times heads) is opened for it and closed again."""
    graph = axes.graph.fx
    with graph.inserting_before(before):
        if axis.root.is_static:
            return graph.call_function(
                aten.index_select.default, (node, dim, _index(axes, selection.indices(axis), node, dim))
            )
        static = [f for f in axis.factors if f.is_static]
        inner = product(static)
        opened = graph.call_function(aten.unflatten.int, (node, dim, [-1, math.prod(int(f.size) for f in static)]))
        picked = graph.call_function(
            aten.index_select.default, (opened, dim + 1, _index(axes, selection.indices(inner), node, dim))
        )
        return graph.call_function(aten.flatten.using_ints, (picked, dim, dim + 1))


def _index(axes: Axes, index: Tensor, node: fx.Node, dim: int) -> fx.Node:
    """A constant index; a padded unit reads unit 0, any finite value will do behind zero weights."""
    return axes.graph.add_tensor(f"tilecut_keep_{node.name}_{dim}_{len(axes.graph.fx.nodes)}", index.clamp_min(0))
