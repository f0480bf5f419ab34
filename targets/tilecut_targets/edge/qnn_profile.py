"""target="edge:qnn": ONNX for Qualcomm NPUs through onnxruntime's QNN execution provider, static and of its ops alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilecut_targets.edge.additive_attention import additive_attention
from tilecut_targets.edge.device_profile import DeviceProfile
from tilecut_targets.edge.onnx_ops import PORTABLE_OPSET


@dataclass(frozen=True)
class QnnTarget(DeviceProfile):
    """A Qualcomm NPU."""

    chip: str | None = "qnn"
    word: ClassVar[str] = "qnn"
    opset = PORTABLE_OPSET
    why: ClassVar[Mapping[str, str]] = {
        "attention": "MatMul, Add and Softmax: the provider has no attention op; masks are added, not chosen",
        "norms": "the provider has LayerNormalization, and RMSNormalization from opset 23 on",
        "rotary": "in simpler ops where sines and cosines are constants (static lengths), else RotaryEmbedding",
        "activations": "the provider has Gelu, Sigmoid, Tanh and Relu",
    }

    @property
    def decompose(self) -> dict[Any, Callable[..., Any]]:
        """Attention in products and additions."""
        return {torch.ops.tilecut.attention.default: additive_attention}
