"""Rules for ops that cut a dimension into pieces or join pieces to one: slice, split, select, cat, stack, pad.

Beside each rule stands what becomes of the op's integer literals when units are selected.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, concat, cut_at, regroup, unify
from tilecut_passes.axes.infer import Axes, NodeTypes, Types, broadcast, freeze_along, fresh, op_name
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import arguments, value_of

aten = torch.ops.aten


def select(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """One index of a dimension, which is frozen."""
    source = axes.input(node)
    source[a["dim"]].freeze("one index of it is selected")
    return [axis for d, axis in enumerate(source) if d != a["dim"] % len(source)]


def unbind(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Any:
    """Every index of a dimension, which is frozen."""
    source = axes.input(node)
    source[a["dim"]].freeze("unbind")
    rest = [axis for d, axis in enumerate(source) if d != a["dim"] % len(source)]
    return [list(rest) for _ in value_of(node)]


def slice_(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A static range makes a concatenation; a whole stride makes a product."""
    source, dim = axes.input(node), a["dim"] % len(axes.input(node))
    axis, out = source[dim].root, fresh(value_of(node))
    if out[dim].size == axis.size:
        return source
    bounds = slice_bounds(a, axis.size)
    if bounds is None:
        return freeze_along(axes, node, [dim], "slice with a dynamic bound")
    low, high = bounds
    kept = _strided(axis, low, high, a["step"]) if a.get("step", 1) != 1 else between(axis, low, high)
    if kept is None:
        return freeze_along(axes, node, [dim], "slice that cuts through a factor")
    return [*source[:dim], kept, *source[dim + 1 :]]


def between(axis: Axis, low: int, high: int) -> Axis | None:
    """The piece of a static axis from `low` to `high`; None if it cannot be cut there."""
    if low >= high:
        return Axis(0)
    marks = sorted({0, low, high, int(axis.size)})
    got = cut_at(axis, marks)
    return None if got is None else got[marks.index(low)]


def _strided(axis: Axis, low: int, high: int, step: int) -> Axis | None:
    """Every `step`th index where the whole axis is made of such strides: the outer factor of a product."""
    whole = int(axis.size) % step == 0 and low < step and high == axis.size
    got = regroup(axis.factors, [int(axis.size) // step, step]) if whole else None
    if got is None:
        return None
    got[1].freeze("strided slice")
    return got[0]


def slice_bounds(a: dict[str, Any], size: Any) -> tuple[int, int] | None:
    """Start and end of a slice or narrow as Python would clamp them; None where one of them is dynamic."""
    start, length, end = a["start"], a.get("length"), a.get("end")
    if not isinstance(size, int) or not all(x is None or isinstance(x, int) for x in (start, length, end)):
        return None
    low, high, _ = slice(start, end).indices(size)
    return low, max(low, high) if length is None else low + length


def split(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """Pieces of a concatenation."""
    source = axes.input(node)
    dim = _split_dim(node, a, len(source))
    made = [fresh(v) for v in value_of(node)]
    sizes = [types[dim].size for types in made]
    if all(isinstance(s, int) for s in sizes):
        got = cut_at(source[dim], list(itertools.accumulate(map(int, sizes), initial=0)))
        if got is not None:
            return [[*source[:dim], g, *source[dim + 1 :]] for g in got]
    why = "split that cuts through a factor"
    source[dim].freeze(why)
    return [[*source[:dim], types[dim].freeze(why), *source[dim + 1 :]] for types in made]


def _split_dim(node: fx.Node, a: dict[str, Any], rank: int) -> int:
    """The dimension that a split op cuts; vsplit, hsplit and dsplit have theirs in their names."""
    named = {"vsplit": 0, "hsplit": min(1, rank - 1), "dsplit": 2}
    return a["dim"] % rank if "dim" in a else named[op_name(node)]


def cat(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A concatenation along `dim`; the other dimensions are one."""
    parts = [axes.of[x] for x in a["tensors"]]
    # An empty 1-D tensor is the neutral element of torch.cat, whatever the rank of the others.
    parts = [p for p in parts if len(p) > 1 or p[0].root.size != 0] or parts
    return concatenate(parts, a["dim"] % len(parts[0]), node.name)


def concatenate(parts: list[Types], dim: int, why: str) -> Types:
    """The types of tensors joined along `dim`."""
    out = []
    for d in range(len(parts[0])):
        if d == dim:
            out.append(concat([p[d] for p in parts if p[d].root.size != 0]))
            continue
        for part in parts[1:]:
            unify(parts[0][d], part[d], why)
        out.append(parts[0][d])
    return out


def stack(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The tensors are one another's; the new dimension is frozen."""
    out = broadcast([axes.of[x] for x in a["tensors"]], node.name)
    out.insert(a["dim"] % (len(out) + 1), Axis(len(a["tensors"])).freeze("stack"))
    return out


def stack_rows(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """vstack, hstack, dstack, column_stack: a concatenation of what has too few dimensions made two or three."""
    name = op_name(node)
    parts = [_at_least(axes.of[x], name) for x in a["tensors"]]
    dim = {"vstack": 0, "dstack": 2}.get(name, min(1, len(parts[0]) - 1))
    return concatenate(parts, dim, node.name)


def _at_least(types: Types, name: str) -> Types:
    """The dimensions of size 1 that a stacking op gives a vector or matrix."""
    if len(types) == 0 and name == "hstack":
        return [Axis(1)]
    if name == "column_stack" and len(types) < 2:
        return [*(types or [Axis(1)]), Axis(1)]
    if name in ("vstack", "dstack") and len(types) < 2:
        types = [Axis(1), *(types or [Axis(1)])]
    return [*types, Axis(1)] if name == "dstack" and len(types) < 3 else types


def glu(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The first half of a dimension times a function of the second: the halves are one."""
    x = axes.input(node)
    dim = a["dim"] % len(x)
    size = x[dim].root.size
    got = cut_at(x[dim], [0, size // 2, size]) if isinstance(size, int) else None
    if got is None:
        return freeze_along(axes, node, [dim], "glu whose halves cut through a factor")
    return [*x[:dim], unify(got[0], got[1], node.name), *x[dim + 1 :]]


def pad(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Constant padding of a static dimension is a concatenation with frozen ends; other padded dimensions are frozen."""
    x, out = axes.input(node), list(axes.input(node))
    amounts = zip(a["pad"][::2], a["pad"][1::2])
    for i, (low, high) in enumerate(amounts, 1):
        if low == 0 and high == 0:
            continue
        grows = a.get("mode", "constant") == "constant" and all(isinstance(n, int) and n >= 0 for n in (low, high))
        if grows and x[-i].root.is_static:
            ends = [Axis(n).freeze("padding") for n in (low, high)]
            out[-i] = concat([axis for axis in (ends[0], x[-i], ends[1]) if axis.root.size != 0])
        else:
            x[-i].freeze("padding")
            out[-i] = fresh(value_of(node))[-i].freeze("padding")
    return out


def resize_split(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """Every op that splits: each piece's own size."""
    dim = _split_dim(node, arguments(node), len(axes.input(node)))
    pieces = [types[dim] for types in axes.of[node]]
    if any(selection.touches(piece) for piece in pieces):
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], [selection.count(piece) for piece in pieces], dim), {}


def resize_slice(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """slice and narrow: the bounds count the units that stay below them."""
    a = arguments(node)
    dim = a["dim"] % len(axes.input(node))
    axis = axes.input(node)[dim].root
    bounds = slice_bounds(a, axis.size)
    if bounds is None or not isinstance(axis.size, int) or not selection.touches(axis) or a.get("step", 1) != 1:
        return
    low, high = bounds
    # The slice is made of whole pieces, padding included: count the pieces before it and inside it.
    marks = sorted({0, low, high, axis.size})
    parts = dict(zip(marks, cut_at(axis, marks) or []))
    counts = {mark: selection.count(part) for mark, part in parts.items()}
    new_low = sum(n for mark, n in counts.items() if mark < low)
    new_high = sum(n for mark, n in counts.items() if mark < high)
    leading = node.args[:2] if node.target is aten.slice_scatter.default else node.args[:1]
    if node.target is aten.narrow.default:
        node.target = aten.slice.Tensor
    node.args, node.kwargs = (*leading, dim, new_low, new_high), {}


SPLITS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
    aten.unsafe_chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
    aten.vsplit.int,
    aten.vsplit.array,
    aten.hsplit.int,
    aten.hsplit.array,
    aten.dsplit.int,
    aten.dsplit.array,
)

RULES = {
    aten.select.int: select,
    aten.unbind.int: unbind,
    aten.slice.Tensor: slice_,
    aten.narrow.default: slice_,
    **dict.fromkeys(SPLITS, split),
    aten.cat.default: cat,
    aten.concat.default: cat,
    aten.concatenate.default: cat,
    aten.stack.default: stack,
    **dict.fromkeys(
        (aten.vstack.default, aten.hstack.default, aten.dstack.default, aten.column_stack.default), stack_rows
    ),
    aten.glu.default: glu,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: pad,
}

RESIZE = {
    **dict.fromkeys(SPLITS, resize_split),
    aten.slice.Tensor: resize_slice,
    aten.narrow.default: resize_slice,
    aten.slice_scatter.default: resize_slice,
}
