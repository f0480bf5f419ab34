"""Rules for ops that only rearrange: reshape, transpose, expand, repeat, slice, split, cat, stack.

Beside each rule stands what becomes of the op's integer literals when units are selected.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, concat, cut_at, divide, multiply, product, regroup, unify
from tilecut_passes.axes.infer import Axes, Types, broadcast, fresh
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import arguments, value_of

aten = torch.ops.aten


def same(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The first argument's shape and meaning."""
    return axes.input(node)


def reshape(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Any:
    """Split and join: the row-major factors of the input, regrouped."""
    source = axes.input(node)
    sizes = [axis.size for axis in fresh(value_of(node))]
    out = regroup([f for axis in source for f in axis.factors], sizes)
    return axes.unknown(node, "reshape mixes dimensions that have no common factors") if out is None else out


def transpose(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Two dimensions swapped."""
    out = list(axes.input(node))
    i, j = a["dim0"], a["dim1"]
    out[i], out[j] = out[j], out[i]
    return out


def reverse(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """All dimensions reversed (t, numpy_T)."""
    return axes.input(node)[::-1]


def permute(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Dimensions reordered."""
    return [axes.input(node)[d] for d in a["dims"]]


def unsqueeze(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A dimension of size 1 more."""
    out = list(axes.input(node))
    out.insert(a["dim"] % (len(out) + 1), Axis(1))
    return out


def squeeze(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Dimensions of size 1 less."""
    source = axes.input(node)
    asked = a.get("dim")
    dims = range(len(source)) if asked is None else [asked] if isinstance(asked, int) else asked
    dropped = {d % len(source) for d in dims}
    return [axis for d, axis in enumerate(source) if d not in dropped or axis.root.size != 1]


def expand(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Size 1 stretches to a fresh axis: repetition."""
    source, out = axes.input(node), fresh(value_of(node))
    for i in range(1, len(source) + 1):
        if source[-i].root.size != 1:
            out[-i] = source[-i]
    return out


def repeat(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Each dimension repeated: the repetition is a frozen factor outside (repeat) or inside (repeat_interleave)."""
    source, out = axes.input(node), fresh(value_of(node))
    padded = [Axis(1)] * (len(out) - len(source)) + list(source)
    made = []
    for new, old in zip(out, padded):
        times = Axis(divide(new.size, old.root.size) or new.size).freeze("repeat")
        made.append(product([times, old] if node.target is aten.repeat.default else [old, times]))
    return made


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


def slice_(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Any:
    """A static range makes a concatenation; a whole stride makes a product."""
    source, dim = axes.input(node), a["dim"] % len(axes.input(node))
    axis, out = source[dim].root, fresh(value_of(node))
    if out[dim].size == axis.size:
        return source
    kept = [*source[:dim], out[dim], *source[dim + 1 :]]
    if not isinstance(axis.size, int) or not all(isinstance(a[k], int) or a[k] is None for k in ("start", "end")):
        axis.freeze("slice with a dynamic bound")
        out[dim].freeze("slice with a dynamic bound")
        return kept
    low, high = slice_bounds(a, axis.size)
    if a["step"] != 1:
        start = a["start"] or 0
        whole = axis.size % a["step"] == 0 and start < a["step"] and high == axis.size
        got = regroup(axis.factors, [axis.size // a["step"], a["step"]]) if whole else None
        if got is None:
            return axes.unknown(node, "slice with a step that is no whole stride")
        got[1].freeze("strided slice")
        kept[dim] = got[0]
        return kept
    if low >= high:
        kept[dim] = Axis(0)
        return kept
    marks = sorted({0, low, high, axis.size})
    got = cut_at(axis, marks)
    if got is None:
        return axes.unknown(node, "slice through the middle of a factor")
    kept[dim] = got[marks.index(low)]
    return kept


def slice_bounds(a: dict[str, Any], size: int) -> tuple[int, int]:
    """Start and end of a slice as Python would clamp them."""
    low, high, _ = slice(a["start"], a["end"]).indices(size)
    return low, max(low, high)


def split(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Any:
    """Pieces of a concatenation."""
    source = axes.input(node)
    dim = a["dim"] % len(source)
    sizes = [fresh(v)[dim].size for v in value_of(node)]
    if all(isinstance(s, int) for s in sizes):
        got = cut_at(source[dim], list(itertools.accumulate(map(int, sizes), initial=0)))
        if got is not None:
            return [[*source[:dim], g, *source[dim + 1 :]] for g in got]
    return axes.unknown(node, "split through the middle of a factor")


def cat(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A concatenation along `dim`; the other dimensions are one."""
    parts = [axes.of[x] for x in a["tensors"]]
    # An empty 1-D tensor is the neutral element of torch.cat, whatever the rank of the others.
    parts = [p for p in parts if len(p) > 1 or p[0].root.size != 0] or parts
    dim = a["dim"] % len(parts[0])
    out = []
    for d in range(len(parts[0])):
        if d == dim:
            out.append(concat([p[d] for p in parts if p[d].root.size != 0]))
            continue
        for part in parts[1:]:
            unify(parts[0][d], part[d], node.name)
        out.append(parts[0][d])
    return out


def stack(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The tensors are one another's; the new dimension is frozen."""
    out = broadcast([axes.of[x] for x in a["tensors"]], node.name)
    out.insert(a["dim"] % (len(out) + 1), Axis(len(a["tensors"])).freeze("stack"))
    return out


def resize_shape(axes: Axes, node: fx.Node, selection: Selection, sizes: list[Any], dims: Types) -> list[Any]:
    """The sizes that a view names, after the selection; -1 and dynamic sizes stay what they are."""
    return [_resize(axes, node, selection, size, axis) for size, axis in zip(sizes, dims, strict=True)]


def _resize(axes: Axes, node: fx.Node, selection: Selection, size: Any, axis: Axis) -> Any:
    if not selection.touches(axis) or size == -1:
        return size
    if axis.root.is_static:
        return selection.count(axis)
    # batch * heads: rescale the dense size; one size node may serve many layers, so this is a fresh expression.
    static = [f for f in axis.factors if f.is_static]
    before, after = multiply(f.size for f in static), math.prod(selection.count(f) for f in static)
    with axes.graph.fx.inserting_before(node):
        outer = axes.graph.fx.call_function(operator.floordiv, (size, int(before)))
        return axes.graph.fx.call_function(operator.mul, (outer, after))


def resize_reshape(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """reshape and expand: the target shape."""
    node.update_arg(1, resize_shape(axes, node, selection, list(cast(Sequence[Any], node.args[1])), axes.of[node]))


def resize_unflatten(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """unflatten: the sizes that one dimension becomes."""
    a = arguments(node)
    dim = a["dim"] % len(axes.input(node))
    node.update_arg(
        2, resize_shape(axes, node, selection, list(a["sizes"]), axes.of[node][dim : dim + len(a["sizes"])])
    )


def resize_split(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """split and chunk: every piece's own size."""
    dim = arguments(node)["dim"] % len(axes.input(node))
    pieces = [types[dim] for types in axes.of[node]]
    if any(selection.touches(piece) for piece in pieces):
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], [selection.count(piece) for piece in pieces], dim), {}


def resize_slice(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """slice: its bounds count the units that stay below them."""
    a = arguments(node)
    dim = a["dim"] % len(axes.input(node))
    axis = axes.input(node)[dim].root
    if not isinstance(axis.size, int) or not selection.touches(axis) or a["step"] != 1:
        return
    low, high = slice_bounds(a, axis.size)
    # The slice is made of whole pieces, padding included: count the pieces before it and inside it.
    marks = sorted({0, low, high, axis.size})
    parts = dict(zip(marks, cut_at(axis, marks) or []))
    counts = {mark: selection.count(part) for mark, part in parts.items()}
    new_low = sum(n for mark, n in counts.items() if mark < low)
    new_high = sum(n for mark, n in counts.items() if mark < high)
    leading = node.args[:1] if node.target is aten.slice.Tensor else node.args[:2]
    node.args, node.kwargs = (*leading, dim, new_low, new_high), {}


RULES = {
    aten.dropout.default: same,
    aten.contiguous.default: same,
    aten.clone.default: same,
    aten.alias.default: same,
    aten.detach.default: same,
    aten.to.dtype: same,
    aten.to.device: same,
    aten.to.dtype_layout: same,
    aten.to.other: same,
    aten._to_copy.default: same,
    aten.type_as.default: same,
    aten.lift_fresh_copy.default: same,
    aten.zeros_like.default: same,
    aten.ones_like.default: same,
    aten.full_like.default: same,
    aten.rand_like.default: same,
    aten.empty_like.default: same,
    aten.view.default: reshape,
    aten.reshape.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.flatten.using_ints: reshape,
    aten.unflatten.int: reshape,
    aten.transpose.int: transpose,
    aten.t.default: reverse,
    aten.numpy_T.default: reverse,
    aten.permute.default: permute,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.squeeze.default: squeeze,
    aten.expand.default: expand,
    aten.repeat.default: repeat,
    aten.repeat_interleave.self_int: repeat,
    aten.select.int: select,
    aten.unbind.int: unbind,
    aten.slice.Tensor: slice_,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split,
    aten.chunk.default: split,
    aten.cat.default: cat,
    aten.stack.default: stack,
}

RESIZE = {
    aten.view.default: resize_reshape,
    aten.reshape.default: resize_reshape,
    aten._unsafe_view.default: resize_reshape,
    aten.expand.default: resize_reshape,
    aten.unflatten.int: resize_unflatten,
    aten.split.Tensor: resize_split,
    aten.split_with_sizes.default: resize_split,
    aten.chunk.default: resize_split,
    aten.slice.Tensor: resize_slice,
    aten.slice_scatter.default: resize_slice,
}
