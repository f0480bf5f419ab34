"""Rules for ops that mix neighbouring places of the last dimensions: pooling, resampling, edge padding, patches.

Places are frozen; the batch and the channels before them pass through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, product, regroup
from tilecut_passes.axes.infer import Axes, NodeTypes, Rule, Types, for_each_result, freeze_along, fresh, op_name
from tilecut_passes.graph import value_of

aten = torch.ops.aten


def windows(places: int) -> Rule:
    """The rule of an op whose windows run over the last `places` dimensions."""

    def rule(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
        return for_each_result(node, freeze_along(axes, node, range(-places, 0), f"windows of {op_name(node)}"))

    return rule


def im2col(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """[.., C, H, W] -> [.., C*k, L]: k places of each of L windows, beside every channel."""
    *rest, channels, height, width = axes.input(node)
    height.freeze("windows of im2col")
    width.freeze("windows of im2col")
    window = Axis(a["kernel_size"][0] * a["kernel_size"][1]).freeze("windows of im2col")
    return [*rest, product([channels, window]), fresh(value_of(node))[-1].freeze("windows of im2col")]


def col2im(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[.., C*k, L] -> [.., C, H, W]: the windows of every channel added up where they lay."""
    *rest, columns, count = axes.input(node)
    count.freeze("windows of col2im")
    out = fresh(value_of(node))
    got = regroup(columns.factors, [out[-3].size, a["kernel_size"][0] * a["kernel_size"][1]])
    if got is None:
        return axes.unknown(node, "col2im across the factors of its channels")
    got[1].freeze("windows of col2im")
    return [*rest, got[0], *(axis.freeze("windows of col2im") for axis in out[-2:])]


def pixel_shuffle(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[.., C*r*r, H, W] -> [.., C, H*r, W*r]."""
    *rest, channels, height, width = axes.input(node)
    out = fresh(value_of(node))
    got = regroup(channels.factors, [out[-3].size, a["upscale_factor"] ** 2])
    if got is None:
        return axes.unknown(node, "pixel_shuffle across the factors of its channels")
    for axis in (got[1], height, width, *out[-2:]):
        axis.freeze("pixel_shuffle")
    return [*rest, got[0], *out[-2:]]


def pixel_unshuffle(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """[.., C, H*r, W*r] -> [.., C*r*r, H, W]."""
    *rest, channels, height, width = axes.input(node)
    out = fresh(value_of(node))
    block = Axis(a["downscale_factor"] ** 2)
    for axis in (block, height, width, *out[-2:]):
        axis.freeze("pixel_unshuffle")
    return [*rest, product([channels, block]), *out[-2:]]


def channel_shuffle(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[B, g*C, ..] -> [B, C*g, ..]; the number of groups is a literal, so it is frozen."""
    x = axes.input(node)
    size = x[1].root.size
    got = regroup(x[1].factors, [a["groups"], size // a["groups"]]) if isinstance(size, int) else None
    if got is None:
        return axes.unknown(node, "channel_shuffle across the factors of its channels")
    got[0].freeze("groups of channel_shuffle")
    return [x[0], product(got[::-1]), *x[2:]]


def unfold(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """Windows along a dimension: their number in its place, their width at the end."""
    x, out = list(axes.input(node)), fresh(value_of(node))
    if not x:
        return axes.unknown(node, "unfold of a number")
    d = a["dimension"] % len(x)
    for axis in (x[d], out[d], out[-1]):
        axis.freeze("windows of unfold")
    x[d] = out[d]
    return [*x, out[-1]]


OVER_PLACES = {
    1: (
        aten.avg_pool1d.default,
        aten.adaptive_avg_pool1d.default,
        aten.max_pool1d.default,
        aten.max_pool1d_with_indices.default,
        aten.adaptive_max_pool1d.default,
        aten.upsample_nearest1d.default,
        aten.upsample_nearest1d.vec,
        aten._upsample_nearest_exact1d.vec,
        aten.upsample_linear1d.default,
        aten.upsample_linear1d.vec,
        aten.reflection_pad1d.default,
        aten.replication_pad1d.default,
    ),
    2: (
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten._adaptive_avg_pool2d.default,
        aten.max_pool2d.default,
        aten.max_pool2d_with_indices.default,
        aten.adaptive_max_pool2d.default,
        aten.upsample_nearest2d.default,
        aten.upsample_nearest2d.vec,
        aten._upsample_nearest_exact2d.vec,
        aten.upsample_bilinear2d.default,
        aten.upsample_bilinear2d.vec,
        aten._upsample_bilinear2d_aa.vec,
        aten.upsample_bicubic2d.default,
        aten.upsample_bicubic2d.vec,
        aten._upsample_bicubic2d_aa.vec,
        aten.reflection_pad2d.default,
        aten.replication_pad2d.default,
    ),
    3: (
        aten.avg_pool3d.default,
        aten.adaptive_avg_pool3d.default,
        aten._adaptive_avg_pool3d.default,
        aten.max_pool3d.default,
        aten.max_pool3d_with_indices.default,
        aten.adaptive_max_pool3d.default,
        aten.upsample_nearest3d.default,
        aten.upsample_nearest3d.vec,
        aten._upsample_nearest_exact3d.vec,
        aten.upsample_trilinear3d.default,
        aten.upsample_trilinear3d.vec,
        aten.reflection_pad3d.default,
        aten.replication_pad3d.default,
    ),
}

RULES: dict[object, Rule] = {
    **{op: windows(places) for places, ops in OVER_PLACES.items() for op in ops},
    aten.im2col.default: im2col,
    aten.col2im.default: col2im,
    aten.pixel_shuffle.default: pixel_shuffle,
    aten.pixel_unshuffle.default: pixel_unshuffle,
    aten.channel_shuffle.default: channel_shuffle,
    aten.unfold.default: unfold,
}
