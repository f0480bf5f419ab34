"""Rules for ops to which the order of indices matters: flips, rolls, sorts, running sums, triangles, diagonals, rotary.

The dimensions that they look along are frozen, the others pass through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.axis import unify
from tilecut_passes.axes.infer import (
    Axes,
    NodeTypes,
    Types,
    broadcast,
    dims_of,
    for_each_result,
    freeze_all,
    freeze_along,
    fresh,
    op_name,
)
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import source, value_of

# Importing it registers tilecut::rotary.
from tilecut_runtime import rotary as _rotary_op

aten = torch.ops.aten
assert _rotary_op

# The dimension of an op that has it in its name.
NAMED_DIMS = {"fliplr": 1, "flipud": 0, "msort": 0}


def along(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """flip, roll, sort, cumprod, ..: the order along the named dimensions matters; without a name, along all."""
    name, rank = op_name(node), len(axes.input(node))
    asked = NAMED_DIMS[name] if name in NAMED_DIMS else a["dims"] if "dims" in a else a.get("dim")
    return for_each_result(node, freeze_along(axes, node, dims_of(asked, rank), f"{name} runs over it"))


def best(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """topk: units of the dimension compete, and the second result points into it; how many win is frozen."""
    x, why = axes.input(node), "topk runs over it"
    if not x or not a["largest"] or not isinstance(a["k"], int):
        return along(axes, node, a)
    axes.points[node, 1] = axes.contest(node, a["dim"], why, winners=a["k"])
    d = a["dim"] % len(x)
    won = fresh(value_of(node)[0])[d].freeze(why)
    return for_each_result(node, [*x[:d], won, *x[d + 1 :]])


def running_sum(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """cumsum: a unit that is 0 moves no other, and the sum up to it is its own."""
    x = axes.input(node)
    if x:
        axes.contest(node, a["dim"], "cumsum runs over it", fill=0.0)
    return x


def rotate(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """rot90 turns a plane: an odd number of quarters swaps its dimensions."""
    x, (i, j) = list(axes.input(node)), a["dims"]
    for d in (i, j):
        x[d].freeze("rot90 turns it")
    if a["k"] % 2:
        x[i], x[j] = x[j], x[i]
    return x


def turn_pairs(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """tilecut::rotary: x, cos and sin are one but for the width, whose elements it pairs."""
    operands = [axes.operand(node, a[name]) for name in ("x", "cos", "sin")]
    for one in operands:
        one[-1].freeze("rotary turns pairs of it")
    return broadcast(operands, node.name)


def triangle(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """tril and triu compare the positions in the last two dimensions."""
    return freeze_along(axes, node, (-2, -1), "a triangle of it is taken")


def difference(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """Differences of neighbours."""
    if len(node.all_input_nodes) > 1:
        return axes.unknown(node, "diff with a prefix or suffix")
    return freeze_along(axes, node, [a["dim"]], "diff runs over it")


def diagonal(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The diagonal of a plane is the last dimension."""
    return [*_off_the_plane(axes.input(node), a), fresh(value_of(node))[-1].freeze("diagonal")]


def diagonal_scatter(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Writing the diagonal of a plane."""
    x, written = axes.operand(node, a["self"]), axes.operand(node, a["src"])
    written[-1].freeze("diagonal")
    for axis, other in zip(_off_the_plane(x, a), written[:-1], strict=True):
        unify(axis, other, node.name)
    return x


def _off_the_plane(types: Types, a: dict[str, Any]) -> Types:
    plane = {a["dim1"] % len(types), a["dim2"] % len(types)}
    for d in plane:
        types[d].freeze("diagonal")
    return [axis for d, axis in enumerate(types) if d not in plane]


def diag_embed(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The last dimension becomes the diagonal of a plane."""
    *rest, last = axes.input(node)
    last.freeze("diagonal")
    out = fresh(value_of(node))
    plane = {a["dim1"] % len(out), a["dim2"] % len(out)}
    others = iter(rest)
    return [axis.freeze("diagonal") if d in plane else next(others) for d, axis in enumerate(out)]


def one_hot(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A dimension of classes more: what the indices point into, else frozen."""
    classes = fresh(value_of(node))[-1]
    axes.index_by(classes, source(node), "one_hot")
    return [*axes.input(node), classes]


def resize_one_hot(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """The number of classes."""
    if selection.touches(axes.of[node][-1]):
        node.args, node.kwargs = (node.args[0], selection.count(axes.of[node][-1])), {}


def look_up(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """bucketize, searchsorted, isin: the values' own dimensions; those of the table are frozen, but for a batch of it."""
    values = "self" if "self" in a else "elements"
    x = axes.operand(node, a[values])
    for name, table in a.items():
        if name == values or not isinstance(table, fx.Node):
            continue
        types = axes.operand(node, table)
        if name != "test_elements" and len(types) > 1:
            types[-1].freeze("it is searched")
            broadcast([x[:-1], types[:-1]], node.name)
        else:
            freeze_all(types, "it is searched")
    return x


def found_in_order(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """nonzero, masked_select, masked_scatter: how many and which come out depends on every index."""
    return axes.unknown(node, f"{op_name(node)} goes through it in order")


def repeat_by_count(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """repeat_interleave with a tensor of counts: the dimension is as long as data say."""
    if a["dim"] is None:
        return axes.unknown(node, "repeat_interleave of a flattened tensor")
    freeze_all(axes.of[a["repeats"]], "counts of a repetition")
    return freeze_along(axes, node, [a["dim"]], "repeated by counts")


def cross(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """The cross product along a dimension of three."""
    if a["dim"] is None:
        return axes.unknown(node, "cross without a dimension")
    out = broadcast([axes.operand(node, a[name]) for name in ("self", "other")], node.name)
    out[a["dim"]].freeze("cross product")
    return out


RULES = {
    **dict.fromkeys(
        (
            aten.flip.default,
            aten.fliplr.default,
            aten.flipud.default,
            aten.roll.default,
            aten.sort.default,
            aten.sort.stable,
            aten.msort.default,
            aten.argsort.default,
            aten.argsort.stable,
            aten.cumprod.default,
            aten.logcumsumexp.default,
            aten.cummax.default,
            aten.cummin.default,
        ),
        along,
    ),
    aten.topk.default: best,
    aten.cumsum.default: running_sum,
    aten.rot90.default: rotate,
    torch.ops.tilecut.rotary.default: turn_pairs,
    aten.tril.default: triangle,
    aten.triu.default: triangle,
    aten.diff.default: difference,
    aten.diagonal.default: diagonal,
    aten.linalg_diagonal.default: diagonal,
    aten.diagonal_scatter.default: diagonal_scatter,
    aten.diag_embed.default: diag_embed,
    aten.one_hot.default: one_hot,
    aten.bucketize.Tensor: look_up,
    aten.searchsorted.Tensor: look_up,
    aten.isin.Tensor_Tensor: look_up,
    **dict.fromkeys(
        (
            aten.nonzero.default,
            aten.nonzero_numpy.default,
            aten.argwhere.default,
            aten.where.default,
            aten.masked_select.default,
            aten.masked_scatter.default,
        ),
        found_in_order,
    ),
    aten.repeat_interleave.self_Tensor: repeat_by_count,
    aten.cross.default: cross,
    aten.linalg_cross.default: cross,
}

RESIZE = {aten.one_hot.default: resize_one_hot}
