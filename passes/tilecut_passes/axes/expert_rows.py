"""Rows that are sorted by expert: which calls multiply them, and where what an expert adds can be scaled.

    rows [T, I] -> grouped_matmul with [E, I, O] -> .. -> grouped_matmul -> times the router's weight -> put back in order

The scale of an expert belongs at the last of these that still has its rows together: there its rows are what it adds to
the layer's output, its router weight included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.infer import Axes
from tilecut_passes.graph import is_call, source, value_of

# Importing it registers tilecut::grouped_matmul.
from tilecut_runtime import grouped_matmul as _grouped_matmul_op

aten = torch.ops.aten
assert _grouped_matmul_op
GROUPED = (torch.ops.tilecut.grouped_matmul.default, aten._grouped_mm.default)


@dataclass(frozen=True)
class ExpertRows:
    """Rows `ends[e-1] : ends[e]` of `node`'s result [T, ..] are what expert e along `axis` adds.

    `product` is the last that multiplies them by a matrix for each expert, and `contracted` what it sums over.
    """

    node: fx.Node
    ends: fx.Node
    axis: Axis
    product: fx.Node
    contracted: Axis


def sorted_products(axes: Axes) -> list[tuple[fx.Node, Axis]]:
    """Every product of sorted rows, with the axis of its experts."""
    calls = [n for n in axes.graph.nodes if is_call(n, *GROUPED) and len(axes.input(n, 1)) == 3]
    return [(node, axes.input(node, 1)[0]) for node in calls]


def find_expert_rows(axes: Axes, leaf: Axis) -> tuple[ExpertRows, ...]:
    """Where units of `leaf` can be scaled: one place for every sort."""
    last: dict[fx.Node, fx.Node] = {}
    for node, axis in sorted_products(axes):
        if leaf in axis.leaves:
            last[source(node, 2)] = node
    return tuple(
        ExpertRows(_added(node), ends, axes.input(node, 1)[0], node, axes.input(node, 1)[1])
        for ends, node in last.items()
    )


def _added(node: fx.Node) -> fx.Node:
    """What becomes of rows through elementwise calls of the same shape."""
    while len(node.users) == 1:
        (user,) = node.users
        op = user.target
        is_pointwise = isinstance(op, torch._ops.OpOverload) and torch.Tag.pointwise in op.tags
        if not is_pointwise or value_of(user).shape != value_of(node).shape:
            break
        node = user
    return node
