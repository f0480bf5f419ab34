"""target="edge:coreml": ONNX for Apple devices through onnxruntime's CoreML execution provider (ML programs), static.

The provider has neither Where nor comparisons: masks are added, and a mask input is cast, not compared with zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tilecut_targets.edge.additive_attention import additive_attention
from tilecut_targets.edge.device_profile import DeviceProfile


@dataclass(frozen=True)
class CoreMlTarget(DeviceProfile):
    """An Apple device."""

    chip: str | None = "coreml"
    word: ClassVar[str] = "coreml"
    why: ClassVar[Mapping[str, str]] = {
        "attention": "MatMul, Add and Softmax: the provider has no attention op; masks are added, not chosen",
        "norms": "the provider has LayerNormalization; RMS norms are written out, which it has the ops for",
        "rotary": "written out: the provider has no op for it; where positions are no input, sines and cosines are constants",
        "activations": "the provider has Gelu, Sigmoid, Tanh and Relu",
    }

    @property
    def decompose(self) -> dict[Any, Callable[..., Any]]:
        """Attention in products and additions; a comparison with zero as a cast; -x as a product."""
        return {
            torch.ops.tilecut.attention.default: additive_attention,
            torch.ops.aten.ne.Scalar: not_equal,
            torch.ops.aten.neg.default: negative,
        }


def not_equal(x: Tensor, other: float) -> Tensor:
    """x != other, for zero as a cast to bool."""
    return x.to(torch.bool) if other == 0 else torch.logical_not(torch.eq(x, other))


def negative(x: Tensor) -> Tensor:
    """-x: the provider has no Neg."""
    return x * -1
