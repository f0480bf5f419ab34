"""Where integers go that are indices into a dimension: which expert won, which row of a table the caller asks for.

Before: a call that was just typed. After: its results that hold the same integers, rearranged, are known to point into
the same dimension (`Axes.points`), or to hold ids of the caller (`Axes.ids`); a comparison with 0, 1, .., n-1 makes one of
that dimension and the constant's, whose numbers follow when units go (`Axes.numbers`). Reading something by indices is
its own rule's matter. Whatever else is done with indices freezes what they point into: numbers would no longer mean it.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, unify
from tilecut_passes.axes.infer import Axes, op_name
from tilecut_passes.graph import arguments, is_call, source, value_of

aten = torch.ops.aten

RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.expand.default,
    aten._to_copy.default,
    aten.to.dtype,
)
# The first argument's values, some or all of them, in another order.
CARRIES = (
    *RESHAPES,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.repeat.default,
    aten.index.Tensor,
    aten.gather.default,
    # Their first result does.
    aten.sort.default,
    aten.sort.stable,
)
# Rules that know what an index points into, by the name of the argument that is one.
READS: dict[object, str] = {
    aten.index.Tensor: "indices",
    aten.gather.default: "index",
    aten.scatter.value: "index",
    aten.scatter.src: "index",
    aten.one_hot.default: "self",
    aten.embedding.default: "indices",
}
COMPARISONS = (aten.eq.Tensor, aten.ne.Tensor, aten.le.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor)


# What else the caller's integers may be, by their inputs' names: a row of these tables is no word.
NO_WORDS = ("type", "position", "segment", "mask", "cache")


def holds_words(name: str) -> bool:
    """Whether integers of the input called `name` may be ids of a vocabulary."""
    return not any(part in name for part in NO_WORDS)


def follow_indices(axes: Axes, node: fx.Node) -> None:
    """Note what the results of a call point into, and freeze what is pointed into where the call is none of the above."""
    if node.target is operator.getitem:
        into = axes.points.get((source(node), cast(int, node.args[1])))
        if into is not None:
            axes.points[node, 0] = into
        return
    carried = source(node) if is_call(node, *CARRIES) else None
    if carried in axes.ids:
        axes.ids.add(node)
    for x in node.all_input_nodes:
        into = axes.points.get((x, 0))
        if into is None:
            continue
        if x is carried:
            axes.points[node, 0] = into
        elif not _is_read(node, x) and not (is_call(node, *COMPARISONS) and _numbers(axes, node, x, into)):
            into.freeze(f"{op_name(node)} takes indices into it")


def _is_read(node: fx.Node, x: fx.Node) -> bool:
    """Whether a call reads something at the indices that `x` holds."""
    if not is_call(node, *READS):
        return False
    index = arguments(node)[READS[node.target]]
    return x in index if isinstance(index, list | tuple) else x is index


def _numbers(axes: Axes, node: fx.Node, x: fx.Node, into: Axis) -> bool:
    """Whether indices are compared with others into the same, or with all of 0, 1, .., n-1."""
    first, second = node.args[:2]
    other = second if first is x else first
    if not isinstance(other, fx.Node):
        return False
    if (also := axes.points.get((other, 0))) is not None:
        unify(into, also, node.name)
        return True
    if not _counts_to(other, into):
        return False
    border = next((b for b in axes.borders if b.user is node and b.source is other), None)
    wide = [axis for axis in border.axes if axis.root.size != 1] if border is not None else []
    if len(wide) != 1:
        return False
    unify(into, wide[0], node.name)
    axes.numbers[node, other] = into
    return True


def _counts_to(node: fx.Node, into: Axis) -> bool:
    """Whether a constant is 0, 1, .., n-1 for the n units of an axis."""
    while is_call(node, *RESHAPES):
        node = source(node)
    if not is_call(node, aten.arange.default, aten.arange.start, aten.arange.start_step):
        return False
    a = arguments(node)
    is_plain = a.get("start", 0) == 0 and a.get("step", 1) == 1 and not value_of(node).is_floating_point()
    return is_plain and a["end"] == into.root.size
