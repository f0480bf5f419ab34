"""A convolution as a matrix product of windows (im2col), for closed-form refits: a matrix for every group of channels.

    x [B, g*I, ..], weight [g*O, I, k..]   ->   rows [N, I * prod(k)] and a matrix [O, I * prod(k)] for each of g groups

Any number of dimensions, strides, dilations, zero padding as numbers or "same". Transposed convolutions are none of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tilecut_passes.graph import arguments, is_call, source
from tilecut_passes.step_graph import Stepper

aten = torch.ops.aten
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)
# Windows repeat every input as often as the kernel is large: they are made in pieces of about this size.
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class ConvolutionLayer:
    """y = windows(x) W^T + b for each of `groups` groups of channels."""

    weight: str
    bias: str | None
    groups: int

    def matrices(self, held: Tensor) -> Tensor:
        """What the tensor `weight` holds as [groups, O, I * prod(k)], a view."""
        return held.view(self.groups, held.shape[0] // self.groups, -1)

    def rows(self, node: fx.Node, run: Stepper, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per group and piece: windows [N, I * prod(k)] that the call sees in `run`, and their targets [N, O]."""
        a = arguments(node)
        x, kernel = run.read(source(node)), run.graph.tensor(self.weight).shape[2:]
        if x.ndim == len(kernel) + 1:
            x, target = x[None], target[None]
        # [B, places.., g, O]
        target = target.movedim(1, -1).unflatten(-1, (self.groups, -1))
        valid = run.batch.valid(target)
        windows = windows_of(x, kernel, a)
        width = windows.shape[1] * math.prod(kernel)
        places = math.prod(target.shape[1:-2])
        images = max(1, CHUNK_BYTES // (4 * width * places))
        lines = max(1, CHUNK_BYTES * target.shape[1] // (4 * width * places))
        for start in range(0, len(x), images):
            for line in range(0, target.shape[1], lines):
                here = (slice(start, start + images), slice(line, line + lines))
                seen = windows[here[0], :, here[1]].unflatten(1, (self.groups, -1))
                # [B, g, I, places.., k..] -> [B, places.., g, I, k..]
                seen = seen.movedim((1, 2), (1 + len(kernel), 2 + len(kernel)))
                seen = seen.reshape(*seen.shape[: 2 + len(kernel)], -1)
                wanted = target[here]
                if valid is not None:
                    seen, wanted = seen[valid[here]], wanted[valid[here]]
                seen, wanted = seen.flatten(0, -3), wanted.flatten(0, -3)
                for group in range(self.groups):
                    yield group, seen[:, group], wanted[:, group]


def convolution_layer(node: fx.Node) -> ConvolutionLayer | None:
    """The layer that a call is, or None."""
    if not is_call(node, *CONVOLUTIONS):
        return None
    a = arguments(node)
    weight, bias = a["weight"], a["bias"]
    if any(x is not None and x.op != "get_attr" for x in (weight, bias)) or a.get("transposed"):
        return None
    return ConvolutionLayer(str(weight.target), None if bias is None else str(bias.target), a["groups"])


def windows_of(x: Tensor, kernel: tuple[int, ...], a: dict[str, Any]) -> Tensor:
    """What a convolution multiplies: [B, C, places.., k..], a view of the padded input [B, C, ..]."""
    stride, dilation = (_each(a[name], len(kernel)) for name in ("stride", "dilation"))
    if a["padding"] == "same":
        both = [d * (k - 1) for d, k in zip(dilation, kernel)]
        padding = [(total // 2, total - total // 2) for total in both]
    elif a["padding"] == "valid":
        padding = [(0, 0)] * len(kernel)
    else:
        padding = [(p, p) for p in _each(a["padding"], len(kernel))]
    x = F.pad(x, [p for pair in padding[::-1] for p in pair])
    for i, k in enumerate(kernel):
        x = x.unfold(2 + i, dilation[i] * (k - 1) + 1, stride[i])
    for i, d in enumerate(dilation):
        x = x[(slice(None),) * (2 + len(kernel) + i) + (slice(None, None, d),)]
    return x


def _each(given: int | list[int], count: int) -> list[int]:
    values = [given] if isinstance(given, int) else list(given)
    return values * count if len(values) == 1 else values
