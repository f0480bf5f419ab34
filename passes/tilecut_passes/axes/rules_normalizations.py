"""Rules for norms: each scales by statistics over some dimensions, which are marked `norm`, and by weights per channel.

Beside each rule stands what becomes of the op's integer literals when units are selected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, product, regroup, unify
from tilecut_passes.axes.infer import Axes, NodeTypes, Types, fresh, op_name
from tilecut_passes.axes.rules_views import resize_shape, set_argument
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import arguments, sizes_of, value_of

aten = torch.ops.aten

CHANNEL_VECTORS = ("weight", "bias", "running_mean", "running_var")


def norm(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """layer_norm and rms_norm: statistics over the last dimensions, so removing a unit is not masking it."""
    x = axes.of[a["input"]]
    rank = len(a["normalized_shape"])
    for name in ("weight", "bias"):
        if a.get(name) is not None:
            for axis, other in zip(x[-rank:], axes.of[a[name]]):
                unify(axis, other, node.name)
    mark(x[-rank:])
    return _with_statistics(node, x, [*x[:-rank], *[Axis(1)] * rank])


def batch_norm(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[B, C, ..] scaled per channel; without running statistics those of the batch and the places are taken."""
    x = axes.of[a["input"]]
    _tie_channels(axes, node, a, x[1])
    if a.get("training") or a.get("running_mean") is None:
        mark([x[0], *x[2:]])
    return _with_statistics(node, x, [x[1]])


def instance_norm(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[B, C, ..] scaled per channel by statistics over the places of one instance."""
    x = axes.of[a["input"]]
    _tie_channels(axes, node, a, x[1])
    if a["use_input_stats"]:
        mark(x[2:])
    return x


def group_norm(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[B, G*C, ..] by statistics over C and the places of each group: whole groups are units, channels are `norm`."""
    x = axes.of[a["input"]]
    got = _norm_groups(x, a)
    if got is None:
        return axes.unknown(node, "group norm across the factors of its channels")
    _tie_channels(axes, node, a, product(got))
    mark([got[1], *x[2:]])
    if op_name(node) == "native_group_norm":
        # It names the number of places, and the batch.
        for axis in (x[0], *x[2:]):
            axis.freeze("its size is a literal")
    return _with_statistics(node, x, [x[0], got[0]])


def _norm_groups(x: Types, a: dict[str, Any]) -> list[Axis] | None:
    groups = a["num_groups"] if "num_groups" in a else a["group"]
    return regroup(x[1].factors, [groups, int(x[1].root.size) // groups]) if x[1].root.is_static else None


def _tie_channels(axes: Axes, node: fx.Node, a: dict[str, Any], channels: Axis) -> None:
    for name in CHANNEL_VECTORS:
        if a.get(name) is not None:
            unify(channels, axes.of[a[name]][0], node.name)


def weight_norm(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A direction over its norm along all dimensions but one, times a length for each index of that one."""
    v, length = axes.of[a["v"]], axes.of[a["g"]]
    d = a["dim"] % len(v)
    # A padded unit is a row of zeros.
    unify(v[d], length[d], node.name).freeze("a row of zeros has no direction")
    mark([*v[:d], *v[d + 1 :]])
    return v


def _with_statistics(node: fx.Node, x: Types, statistics: Types) -> NodeTypes:
    """`x`, and where the op returns its statistics too, their types; some modes return empty ones."""
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return x
    sizes = [axis.size for axis in statistics]
    return [x, *(list(statistics) if sizes_of(v) == sizes else fresh(v) for v in value[1:])]


def mark(types: Types) -> None:
    """Note that statistics run over these dimensions."""
    for axis in types:
        axis.mark("norm")


def softmax(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Units of the dimension that sums to one compete."""
    x = axes.input(node)
    if x:
        axes.contest(node, a["dim"], "softmax runs over it")
    return x


def channel_slopes(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """prelu: one slope for all, or one a channel, which is dimension 1."""
    x, slopes = axes.input(node), axes.of[a["weight"]]
    if slopes and slopes[0].root.size != 1:
        unify(x[min(1, len(x) - 1)], slopes[0], node.name)
    return x


def resize_norm(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """The normalized shape."""
    sizes = list(arguments(node)["normalized_shape"])
    set_argument(node, "normalized_shape", resize_shape(axes, node, selection, sizes, axes.input(node)[-len(sizes) :]))


def resize_group_norm(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """The number of groups, and of channels where it is named."""
    x, a = axes.input(node), arguments(node)
    got = _norm_groups(x, a)
    if got is None or not selection.touches(x[1]):
        return
    set_argument(node, "num_groups" if "num_groups" in a else "group", selection.count(got[0]))
    if "C" in a:
        set_argument(node, "C", selection.count(x[1]))


LAYER_NORMS = (
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
    aten._fused_rms_norm.default,
)
GROUP_NORMS = (aten.group_norm.default, aten.native_group_norm.default)

RULES = {
    **dict.fromkeys(LAYER_NORMS, norm),
    **dict.fromkeys(GROUP_NORMS, group_norm),
    **dict.fromkeys(
        (
            aten.batch_norm.default,
            aten.native_batch_norm.default,
            aten._native_batch_norm_legit_no_training.default,
            aten._native_batch_norm_legit.no_stats,
        ),
        batch_norm,
    ),
    aten.instance_norm.default: instance_norm,
    aten._weight_norm.default: weight_norm,
    **dict.fromkeys(
        (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default), softmax
    ),
    aten.prelu.default: channel_slopes,
}

RESIZE: dict[object, Callable[[Axes, fx.Node, Selection], None]] = {
    **dict.fromkeys(LAYER_NORMS, resize_norm),
    **dict.fromkeys(GROUP_NORMS, resize_group_norm),
}
