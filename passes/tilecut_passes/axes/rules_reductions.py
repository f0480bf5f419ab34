"""Rules for ops that reduce whole dimensions: sums, statistics, extrema.

A sum without a unit is the sum with that unit times 0, so it is a sink. The others are statistics over the dimension:
removing a unit is not masking it, and the dimension is marked `norm`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.infer import (
    Axes,
    NodeTypes,
    Types,
    broadcast,
    dims_of,
    for_each_result,
    op_name,
    result_is_used,
)

aten = torch.ops.aten


def sum_(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Summed dimensions are contracted."""
    x = axes.input(node)
    dims = dims_of(a.get("dim"), len(x))
    for d in dims:
        axes.sink(node, 0, d)
    return without(x, dims, a.get("keepdim"))


def statistic(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """Means, variances, norms and the like are read off whole dimensions."""
    x = axes.input(node)
    dims = dims_of(a.get("dim"), len(x))
    for d in dims:
        x[d].mark("norm")
    return for_each_result(node, without(x, dims, a.get("keepdim")))


def extremum_at(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """max and min along a dimension: a statistic, unless somebody reads at which index it is."""
    if not result_is_used(node, 1):
        return statistic(axes, node, a)
    x, why = axes.input(node), "the index of its extremum is read"
    if op_name(node) == "max" and x:
        axes.points[node, 1] = axes.contest(node, a["dim"], why, winners=1)
    else:
        x[a["dim"]].freeze(why)
    return for_each_result(node, without(x, dims_of(a["dim"], len(x)), a["keepdim"]))


def winner(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """argmax along a dimension: its units compete, and the result points into it."""
    x = axes.input(node)
    if a["dim"] is None or not x:
        return position(axes, node, a)
    axes.points[node, 0] = axes.contest(node, a["dim"], "an index along it is computed", winners=1)
    return without(x, dims_of(a["dim"], len(x)), a["keepdim"])


def position(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """argmin, median, mode, ..: an index along the dimension comes out, so it is frozen."""
    x = axes.input(node)
    dims = dims_of(a.get("dim"), len(x))
    for d in dims:
        x[d].freeze("an index along it is computed")
    return for_each_result(node, without(x, dims, a.get("keepdim")))


def similarity(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """cosine_similarity and pairwise_distance: elementwise, then norms along a dimension."""
    out = broadcast([axes.operand(node, a[name]) for name in ("x1", "x2")], node.name)
    dims = dims_of(a.get("dim", -1), len(out))
    for d in dims:
        out[d].mark("norm")
    return without(out, dims, a.get("keepdim"))


def without(types: Types, dims: Iterable[int], keepdim: Any) -> Types:
    """The types after a reduction: the dimensions are gone, or of size 1."""
    gone = set(dims)
    return [Axis(1) if d in gone else axis for d, axis in enumerate(types) if d not in gone or keepdim]


SUMS = (
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.nansum.default,
    aten.count_nonzero.default,
    aten.count_nonzero.dim_IntList,
)
STATISTICS = (
    aten.mean.default,
    aten.mean.dim,
    aten.nanmean.default,
    aten.amax.default,
    aten.amin.default,
    aten.aminmax.default,
    aten.max.default,
    aten.min.default,
    aten.median.default,
    aten.nanmedian.default,
    aten.quantile.scalar,
    aten.prod.default,
    aten.prod.dim_int,
    aten.any.default,
    aten.any.dim,
    aten.any.dims,
    aten.all.default,
    aten.all.dim,
    aten.all.dims,
    aten.var.default,
    aten.var.dim,
    aten.var.correction,
    aten.std.default,
    aten.std.dim,
    aten.std.correction,
    aten.var_mean.default,
    aten.var_mean.dim,
    aten.var_mean.correction,
    aten.std_mean.default,
    aten.std_mean.dim,
    aten.std_mean.correction,
    aten.logsumexp.default,
    aten.special_logsumexp.default,
    aten.norm.Scalar,
    aten.norm.ScalarOpt_dim,
    aten.linalg_norm.default,
    aten.linalg_vector_norm.default,
)
POSITIONS = (
    aten.argmin.default,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
    aten.kthvalue.default,
)

EXTREMA = (aten.max.dim, aten.min.dim)
SIMILARITIES = (aten.cosine_similarity.default, aten.pairwise_distance.default)

RULES = {
    **dict.fromkeys(SUMS, sum_),
    **dict.fromkeys(STATISTICS, statistic),
    **dict.fromkeys(POSITIONS, position),
    aten.argmax.default: winner,
    **dict.fromkeys(EXTREMA, extremum_at),
    **dict.fromkeys(SIMILARITIES, similarity),
}
