"""Ops of the standard ONNX domain that torch's exporter has no road to from ours. Under eager torch they return zeros.

Specification: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

import torch
from torch import Tensor

# The last at which torch's exporter still writes RMSNormalization and RotaryEmbedding.
PORTABLE_OPSET = 23


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """ai.onnx::Attention (opset 23): q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, E] -> [B, Hq, Sq, E].

    mask is added to the scores: [B|1, Hq|1, Sq, Sk]; one that is broadcast over queries is refused by onnxruntime.
    """
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    return torch.onnx.ops.symbolic(
        "Attention",
        inputs,
        attrs={"scale": scale, "is_causal": int(causal)},
        dtype=q.dtype,
        shape=(*q.shape[:3], v.shape[-1]),
        version=23,
    )
