"""Rules for ops that only rearrange whole dimensions: reshape, transpose, expand, repeat, copies.

Beside each rule stands what becomes of the op's integer literals when units are selected.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, cast

import sympy
import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, divide, multiply, product, regroup, unify
from tilecut_passes.axes.infer import Axes, NodeTypes, Types, broadcast, dims_of, fresh
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import Size, arguments, sizes_of, value_of

aten = torch.ops.aten


def same(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The first argument's shape and meaning."""
    return axes.input(node)


def reshape(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Split and join: the row-major factors of the input, regrouped; what mixes without common factors is frozen."""
    given = axes.input(node)
    sizes = sizes_of(value_of(node))
    out: Types = []
    for here, wanted in _blocks(given, sizes):
        made = regroup([f for axis in here for f in axis.factors], wanted)
        if made is None:
            made = [Axis(size) for size in wanted]
            for axis in (*here, *made):
                axis.freeze("reshape mixes dimensions that have no common factors")
        out += made
    return out


def _blocks(given: Types, sizes: list[Size]) -> Iterator[tuple[Types, list[Size]]]:
    """Both sides cut into the smallest runs that hold equally many elements: a reshape mixes within a run only."""
    front = 0
    while front < min(len(given), len(sizes)) and given[front].root.size == sizes[front]:
        yield given[front : front + 1], sizes[front : front + 1]
        front += 1
    back = 0
    while back < min(len(given), len(sizes)) - front and given[-1 - back].root.size == sizes[-1 - back]:
        back += 1
    yield from _runs(given[front : len(given) - back], sizes[front : len(sizes) - back])
    for i in range(back, 0, -1):
        yield [given[-i]], [sizes[-i]]


def _runs(given: Types, sizes: list[Size]) -> Iterator[tuple[Types, list[Size]]]:
    i = j = 0
    # A run ends where both sides have the same product so far; a single dimension on a side has no such place.
    for m in range(1, len(given) if len(sizes) > 1 else 1):
        rows = multiply(axis.root.size for axis in given[i:m])
        end = next((n for n in range(j, len(sizes)) if _equal(rows, multiply(sizes[j:n]))), None)
        if end is not None:
            yield given[i:m], sizes[j:end]
            i, j = m, end
    if given[i:] or sizes[j:]:
        yield given[i:], sizes[j:]


def _equal(a: Size, b: Size) -> bool:
    """Whether two sizes are the same, whatever the form they are written in."""
    return a == b or (not (isinstance(a, int) and isinstance(b, int)) and sympy.expand(sympy.sympify(a) - b) == 0)


def reshape_as(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """A reshape to the dimensions of another tensor."""
    out = reshape(axes, node, a)
    for axis, other in zip(out, axes.operand(node, a["other"]), strict=True):
        unify(axis, other, node.name)
    return out


def transpose(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Two dimensions swapped."""
    return swapped(axes.input(node), *(a[name] for name in a if name != "self"))


def transpose_matrix(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The last two dimensions swapped."""
    return swapped(axes.input(node), -2, -1)


def swapped(types: Types, i: int, j: int) -> Types:
    """The types with two of them swapped."""
    out = list(types)
    if out:
        out[i], out[j] = out[j], out[i]
    return out


def reverse(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """All dimensions reversed (t, numpy_T)."""
    return axes.input(node)[::-1]


def permute(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Dimensions reordered."""
    return [axes.input(node)[d] for d in a["dims"]]


def movedim(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Named dimensions moved to named places; the others keep their order."""
    x = axes.input(node)
    taken, places = (
        [d % len(x) for d in ([a[k]] if isinstance(a[k], int) else a[k])] for k in ("source", "destination")
    )
    order = [d for d in range(len(x)) if d not in taken]
    for place, d in sorted(zip(places, taken, strict=True)):
        order.insert(place, d)
    return [x[d] for d in order]


def unsqueeze(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A dimension of size 1 more."""
    out = list(axes.input(node))
    out.insert(a["dim"] % (len(out) + 1), Axis(1))
    return out


def squeeze(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Dimensions of size 1 less."""
    source = axes.input(node)
    dropped = set() if a.get("dim") == [] else {*dims_of(a.get("dim"), len(source))}
    return [axis for d, axis in enumerate(source) if d not in dropped or axis.root.size != 1]


def at_least(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """atleast_2d and atleast_3d: dimensions of size 1 before a vector, and a last one."""
    x = axes.input(node)
    rank = value_of(node).ndim
    before = [Axis(1)] * (min(rank, 2) - len(x))
    return [*before, *x, *[Axis(1)] * (rank - len(before) - len(x))]


def expand(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Size 1 stretches to a fresh axis: repetition."""
    source, out = axes.input(node), fresh(value_of(node))
    for i in range(1, len(source) + 1):
        if source[-i].root.size != 1:
            out[-i] = source[-i]
    return out


def expand_as(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Size 1 stretches to the other tensor's dimension."""
    return broadcast([axes.operand(node, a["other"]), axes.input(node)], node.name)


def repeat(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """Each dimension repeated: the repetition is a frozen factor outside (repeat, tile) or inside (repeat_interleave)."""
    source, out = axes.input(node), fresh(value_of(node))
    if len(out) < len(source):
        return axes.unknown(node, "repeat_interleave of a flattened tensor")
    inside = node.target is aten.repeat_interleave.self_int
    padded = [Axis(1)] * (len(out) - len(source)) + list(source)
    made = []
    for new, old in zip(out, padded):
        times = Axis(divide(new.size, old.root.size) or new.size).freeze("repeat")
        made.append(product([old, times] if inside else [times, old]))
    return made


def broadcast_tensors(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """Every tensor stretched to the common dimensions."""
    out = broadcast([axes.operand(node, x) for x in a["tensors"]], node.name)
    return [list(out) for _ in a["tensors"]]


def as_complex(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The last dimension holds real and imaginary parts."""
    *rest, parts = axes.input(node)
    parts.freeze("real and imaginary part")
    return rest


def as_real(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A last dimension of real and imaginary parts more."""
    return [*axes.input(node), Axis(2).freeze("real and imaginary part")]


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


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give a call another value for the argument of that name."""
    names = [argument.name for argument in cast(torch._ops.OpOverload, node.target)._schema.arguments]
    if names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)
    else:
        node.update_kwarg(name, value)


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


COPIES = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.atleast_1d.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.lift_fresh_copy.default,
    aten.real.default,
    aten.imag.default,
)

RULES = {
    **dict.fromkeys(COPIES, same),
    aten.view.default: reshape,
    aten.reshape.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.flatten.using_ints: reshape,
    aten.ravel.default: reshape,
    aten.unflatten.int: reshape,
    aten.view_as.default: reshape_as,
    aten.reshape_as.default: reshape_as,
    aten.transpose.int: transpose,
    aten.swapaxes.default: transpose,
    aten.swapdims.default: transpose,
    aten.mT.default: transpose_matrix,
    aten.mH.default: transpose_matrix,
    aten.adjoint.default: transpose_matrix,
    aten.t.default: reverse,
    aten.numpy_T.default: reverse,
    aten.matrix_H.default: reverse,
    aten.permute.default: permute,
    aten.movedim.int: movedim,
    aten.movedim.intlist: movedim,
    aten.moveaxis.int: movedim,
    aten.moveaxis.intlist: movedim,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.squeeze.default: squeeze,
    aten.atleast_2d.default: at_least,
    aten.atleast_3d.default: at_least,
    aten.expand.default: expand,
    aten.broadcast_to.default: expand,
    aten.expand_as.default: expand_as,
    aten.broadcast_tensors.default: broadcast_tensors,
    aten.repeat.default: repeat,
    aten.tile.default: repeat,
    aten.repeat_interleave.self_int: repeat,
    aten.view_as_complex.default: as_complex,
    aten.view_as_real.default: as_real,
}

RESIZE = {
    aten.view.default: resize_reshape,
    aten.reshape.default: resize_reshape,
    aten._unsafe_view.default: resize_reshape,
    aten.expand.default: resize_reshape,
    aten.broadcast_to.default: resize_reshape,
    aten.unflatten.int: resize_unflatten,
}
