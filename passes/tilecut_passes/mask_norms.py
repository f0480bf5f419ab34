"""What masking means where statistics are read: norms and means run over the units that stay.

Before: a graph, its axes and a selection. After: every norm and every reduction over a dimension that loses units sees the
units that stay; a norm's result is put back to its old width, with zeros where units went. A norm of fewer channels is
another function than one of channels times 0, so `mask` needs this where `prune` needs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.infer import Axes, dims_of
from tilecut_passes.axes.rules_normalizations import CHANNEL_VECTORS, GROUP_NORMS, LAYER_NORMS, resize_group_norm
from tilecut_passes.axes.rules_reductions import EXTREMA, SIMILARITIES, STATISTICS
from tilecut_passes.axes.rules_views import set_argument
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import arguments, is_call, value_of

aten = torch.ops.aten


def restrict_statistics(axes: Axes, selection: Selection) -> int:
    """Rewrite every norm and reduction of `axes.graph` over a dimension that loses units; returns how many."""
    one = _Restrict(axes, selection)
    for node in list(axes.graph.nodes):
        if is_call(node, *STATISTICS, *EXTREMA, *SIMILARITIES):
            one.reduction(node)
        elif is_call(node, *LAYER_NORMS):
            one.norm(node, dims_of(range(-len(arguments(node)["normalized_shape"]), 0), len(axes.input(node))))
        elif is_call(node, *GROUP_NORMS):
            one.norm(node, [1])
        elif is_call(node, aten._weight_norm.default):
            rank = len(axes.input(node))
            one.norm(node, [d for d in range(rank) if d != arguments(node)["dim"] % rank])
    return one.count


class _Restrict:
    def __init__(self, axes: Axes, selection: Selection):
        self.axes, self.graph, self.selection, self.count = axes, axes.graph, selection, 0

    def reduction(self, node: fx.Node) -> None:
        """Means, variances, extrema and the like read the units that stay."""
        operands = [0, 1] if is_call(node, *SIMILARITIES) else [0]
        dims = arguments(node).get("dim", -1 if len(operands) > 1 else None)
        for argument in operands:
            types = self.axes.input(node, argument)
            lost = [d for d in dims_of(dims, len(types)) if self.selection.loses(types[d])]
            for dim in lost:
                x = node.args[argument]
                assert isinstance(x, fx.Node)
                node.update_arg(argument, self._select(x, dim, types[dim], node))
            self.count += bool(lost)

    def norm(self, node: fx.Node, dims: Sequence[int]) -> None:
        """A norm sees the units that stay, with their weights; its result has zeros in the place of the others."""
        types, a = self.axes.input(node), arguments(node)
        lost = [d for d in dims if self.selection.loses(types[d])]
        if not lost:
            return
        if is_call(node, *GROUP_NORMS):
            resize_group_norm(self.axes, node, self.selection)
        x = node.args[0]
        assert isinstance(x, fx.Node)
        for dim in lost:
            x = self._select(x, dim, types[dim], node)
        node.update_arg(0, x)
        for name in CHANNEL_VECTORS:
            vector: fx.Node | None = a.get(name)
            if vector is None:
                continue
            for place, axis in enumerate(self.axes.of[vector]):
                if self.selection.loses(axis):
                    vector = self._select(vector, place, axis, node)
            set_argument(node, name, vector)
        if is_call(node, *LAYER_NORMS):
            sizes = [self.selection.count(axis) for axis in types[-len(a["normalized_shape"]) :]]
            set_argument(node, "normalized_shape", sizes)
        for result in self._results(node):
            users, placed = list(result.users), result
            for dim in lost:
                placed = self._put_back(placed, dim, len(types), types[dim])
            # What comes later is typed by what it reads.
            self.axes.of[placed] = types
            for user in users:
                user.replace_input_with(result, placed)
        self.count += 1

    def _results(self, node: fx.Node) -> list[fx.Node]:
        """The normed tensor; an op that gives its statistics too has it first."""
        if isinstance(value_of(node), Tensor):
            return [node]
        return [user for user in node.users if user.args[1] == 0]

    def _select(self, x: fx.Node, dim: int, axis: Axis, before: fx.Node) -> fx.Node:
        kept = self.selection.kept_mask(axis).nonzero().flatten()
        index = self.graph.add_tensor(f"tilecut_statistics_{before.name}_{x.name}_{dim}", kept)
        with self.graph.fx.inserting_before(before):
            return self.graph.fx.call_function(aten.index_select.default, (x, dim, index))

    def _put_back(self, x: fx.Node, dim: int, rank: int, axis: Axis) -> fx.Node:
        kept = self.selection.kept_mask(axis)
        # Units that went read the 0 that is appended.
        place = torch.where(kept, kept.cumsum(0) - 1, int(kept.sum()))
        index = self.graph.add_tensor(f"tilecut_places_{x.name}_{dim}", place)
        call = self.graph.fx.call_function
        with self.graph.fx.inserting_after(x):
            padded = call(aten.constant_pad_nd.default, (x, [*[0, 0] * (rank - 1 - dim), 0, 1]))
        with self.graph.fx.inserting_after(padded):
            return call(aten.index_select.default, (padded, dim, index))
