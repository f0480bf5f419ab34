"""Rules for ops that pick or place by index, and for calls that make a tensor from nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.axis import cut_at, unify
from tilecut_passes.axes.infer import Axes, NodeTypes, Types, broadcast, fresh
from tilecut_passes.axes.rules_views import slice_bounds
from tilecut_passes.graph import value_of

aten = torch.ops.aten


def index(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """x[.., i, j, ..]: indexed dimensions are frozen and replaced by the indices' own."""
    x, indices = axes.input(node), a["indices"]
    given = [d for d, one in enumerate(indices) if one is not None]
    if not given or given != list(range(given[0], given[-1] + 1)):
        return axes.unknown(node, "index with a gap")
    for d in given:
        x[d].freeze("it is indexed")
    picked = broadcast([axes.of[indices[d]] for d in given], node.name)
    return [*x[: given[0]], *picked, *x[given[-1] + 1 :]]


def gather(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The gathered dimension is frozen, the others are the index's."""
    x, picked = axes.input(node), axes.operand(node, a["index"])
    dim = a["dim"] % len(x)
    x[dim].freeze("it is gathered")
    picked[dim].freeze("it is gathered")
    for d in range(len(x)):
        if d != dim:
            unify(x[d], picked[d], node.name)
    return picked


def index_select(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The selected dimension is frozen on both sides."""
    x, dim = axes.input(node), a["dim"]
    x[dim].freeze("it is indexed")
    out = fresh(value_of(node))
    return [out[d].freeze("it is indexed") if d == dim % len(x) else x[d] for d in range(len(x))]


def copy(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The source's dimensions are the destination's; size 1 stretches."""
    x, source = axes.input(node), axes.of[a["src"]]
    return [unify(p, q, node.name) if q.root.size != 1 else p for p, q in zip(x, source, strict=True)]


def slice_scatter(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """Writing a static range: that piece of the destination is the source."""
    x, source = axes.input(node), axes.of[a["src"]]
    dim = a["dim"] % len(x)
    axis = x[dim].root
    if (
        not isinstance(axis.size, int)
        or a["step"] != 1
        or not all(isinstance(a[k], int) or a[k] is None for k in ("start", "end"))
    ):
        return axes.unknown(node, "slice_scatter with a step or a dynamic bound")
    low, high = slice_bounds(a, axis.size)
    marks = sorted({0, low, high, axis.size})
    got = cut_at(axis, marks)
    if got is None:
        return axes.unknown(node, "slice_scatter through the middle of a factor")
    for d in range(len(x)):
        unify(got[marks.index(low)] if d == dim else x[d], source[d], node.name)
    return x


def maker(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A tensor from nothing: fresh axes, cut by selecting from it; dynamic sizes are frozen."""
    axes.makers.append(node)
    out = fresh(value_of(node))
    for axis in out:
        if not axis.is_static:
            axis.freeze("dynamic size")
    return out


RULES = {
    aten.index.Tensor: index,
    aten.gather.default: gather,
    aten.index_select.default: index_select,
    aten.copy.default: copy,
    aten.slice_scatter.default: slice_scatter,
    **dict.fromkeys(
        (
            aten.arange.default,
            aten.arange.start,
            aten.arange.start_step,
            aten.full.default,
            aten.zeros.default,
            aten.ones.default,
            aten.new_ones.default,
            aten.new_zeros.default,
            aten.new_full.default,
            aten.new_empty.default,
            aten.empty.memory_format,
            aten.scalar_tensor.default,
            aten.eye.default,
        ),
        maker,
    ),
}
