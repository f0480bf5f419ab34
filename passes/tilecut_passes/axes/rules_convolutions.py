"""Rules for convolutions and their transposes, with and without channel groups.

    plain         [B, g*I, ..] x [g*O, I, ..] -> [B, g*O, ..]
    transposed    [B, g*I, ..] x [g*I, O, ..] -> [B, g*O, ..]

I is contracted. A depthwise convolution has g channels and I = 1: it contracts nothing, and its channels are units.
Beside the rule stands what becomes of the literal g when units are selected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, product, regroup, unify
from tilecut_passes.axes.infer import Axes, Types, fresh, op_name
from tilecut_passes.axes.rules_views import set_argument
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import arguments, value_of

aten = torch.ops.aten


def convolution(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Channels contract within their group; the windows are frozen. The input may come without B."""
    x, weight = axes.of[a["input"]], axes.of[a["weight"]]
    places = len(weight) - 2
    channel = len(x) - places - 1
    out = fresh(value_of(node))
    for axis in (*x[channel + 1 :], *weight[2:], *out[channel + 1 :]):
        axis.freeze("convolution window")
    made = _channels(x[channel], weight, a, is_transposed(node, a), node.name)
    if made is None:
        for axis in (x[channel], *weight[:2], out[channel]):
            axis.freeze("channel groups across the factors of a dimension")
        made = out[channel]
    if x[channel].root.size != a["groups"]:
        axes.sink(node, 0, channel)
    if a["bias"] is not None:
        unify(axes.of[a["bias"]][0], made, node.name)
    return [*x[:channel], made, *out[channel + 1 :]]


def _channels(x: Axis, weight: Types, a: dict[str, Any], transposed: bool, why: str) -> Axis | None:
    """Tie the channels of input, weight and result; returns the result's, or None where g splits none of them."""
    taken, held = _in_groups(x, a["groups"]), _in_groups(weight[0], a["groups"])
    if taken is None or held is None:
        return None
    unify(taken[0], held[0], why)
    unify(taken[1], held[1] if transposed else weight[1], why)
    return product([held[0], weight[1] if transposed else held[1]])


def _in_groups(channels: Axis, groups: int) -> list[Axis] | None:
    """A dimension of channels as [groups, channels of a group]."""
    size = channels.root.size
    return regroup(channels.factors, [groups, size // groups]) if isinstance(size, int) else None


def is_transposed(node: fx.Node, a: dict[str, Any]) -> bool:
    """Whether a convolution is a transposed one."""
    return bool(a.get("transposed")) or op_name(node).startswith("conv_transpose")


def resize_groups(axes: Axes, node: fx.Node, selection: Selection) -> None:
    """The number of channel groups."""
    a = arguments(node)
    weight = axes.of[a["weight"]]
    got = _in_groups(weight[0], a["groups"])
    if got is not None and selection.touches(got[0]):
        set_argument(node, "groups", selection.count(got[0]))


CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)

RULES = dict.fromkeys(CONVOLUTIONS, convolution)

RESIZE = dict.fromkeys(CONVOLUTIONS, resize_groups)
