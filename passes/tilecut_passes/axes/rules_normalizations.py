"""Rules for ops that look along a whole dimension: norms, softmax, reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, unify
from tilecut_passes.axes.infer import Axes, Types
from tilecut_passes.axes.rules_views import resize_shape
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import arguments

aten = torch.ops.aten


def norm(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """layer_norm and rms_norm: statistics over the last dimensions, so removing a unit is not masking it."""
    x = axes.of[a["input"]]
    rank = len(a["normalized_shape"])
    for name in ("weight", "bias"):
        if a.get(name) is not None:
            for axis, other in zip(x[-rank:], axes.of[a[name]]):
                unify(axis, other, node.name)
    for axis in x[-rank:]:
        axis.mark("norm")
    return x


def softmax(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The dimension that sums to one is frozen."""
    x = axes.input(node)
    x[a["dim"]].freeze("softmax runs over it")
    return x


def reduction(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Sums are sinks; means, extrema and variances are statistics over the dimension."""
    x = axes.input(node)
    asked = a.get("dim")
    dims = range(len(x)) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    dims = {d % len(x) for d in dims}
    for d in sorted(dims):
        if node.target is aten.sum.dim_IntList:
            axes.sink(node, 0, d)
        else:
            x[d].mark("norm")
    return [Axis(1) if d in dims else axis for d, axis in enumerate(x) if d not in dims or a.get("keepdim")]


def resize_norm(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """The normalized shape."""
    sizes = list(arguments(node)["normalized_shape"])
    node.update_arg(1, resize_shape(axes, node, selection, sizes, axes.of[node][-len(sizes) :]))


RULES = {
    aten.layer_norm.default: norm,
    aten.rms_norm.default: norm,
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten.log_softmax.int: softmax,
    aten._log_softmax.default: softmax,
    aten.cumsum.default: softmax,
    aten.mean.dim: reduction,
    aten.sum.dim_IntList: reduction,
    aten.amax.default: reduction,
    aten.amin.default: reduction,
    aten.var.correction: reduction,
    aten.linalg_vector_norm.default: reduction,
}

RESIZE = {aten.layer_norm.default: resize_norm, aten.rms_norm.default: resize_norm}
