"""onnxruntime's own ops as functions that torch's exporter writes out. Under eager torch they return zeros.

Specification: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ONNX_OPSET = 20


def attention(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int, scale: float, causal: bool
) -> Tensor:
    """com.microsoft::Attention: packed QKV projection and self-attention.

    x [B, S, I], weight [I, 3*H*D] (q | k | v), bias [3*H*D], mask int32 [B, S] (1 keeps) -> [B, S, H*D].
    `qkv_hidden_sizes` is left out: with it onnxruntime's int8 path is not taken.
    """
    inputs = (x, weight, bias) if mask is None else (x, weight, bias, mask)
    attrs = {"num_heads": num_heads, "scale": scale, "unidirectional": int(causal)}
    return torch.onnx.ops.symbolic(
        "com.microsoft::Attention",
        inputs,
        attrs=attrs,
        dtype=x.dtype,
        shape=(*x.shape[:2], weight.shape[1] // 3),
        version=1,
    )


def multi_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """com.microsoft::MultiHeadAttention on projected operands.

    q [B, Sq, H*D], k [B, Sk, H*D], v [B, Sk, H*E], key_padding int32 [B, Sk], bias [B|1, H|1, Sq, Sk] -> [B, Sq, H*E].
    Keys and values of one width may have their heads set apart, [B, H, Sk, D]: they are read as they are.
    """
    inputs: tuple[Tensor | None, ...] = (q, k, v, None, key_padding, bias)
    while inputs[-1] is None:
        inputs = inputs[:-1]
    attrs = {"num_heads": num_heads, "scale": scale, "unidirectional": int(causal)}
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        inputs,
        attrs=attrs,
        dtype=q.dtype,
        shape=(*q.shape[:2], v.shape[-1] * (num_heads if v.ndim == 4 else 1)),
        version=1,
    )


def residual_sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y spelled Sum, which onnxruntime does not fuse into its slow SkipLayerNormalization."""
    return torch.onnx.ops.symbolic("Sum", (x, y), dtype=x.dtype, shape=x.shape, version=13)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """com.microsoft::BiasGelu: gelu(x + bias) with the error function; x [.., N], bias [N]."""
    return torch.onnx.ops.symbolic("com.microsoft::BiasGelu", (x, bias), dtype=x.dtype, shape=x.shape, version=1)


def rotary(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """com.microsoft::RotaryEmbedding: x [B, H, S, D] or [B, S, H*D], tables [rows, D/2].

    positions int64: [B, S] are the rows of the tables; [1] is the row of the first place, the others follow it.
    """
    return torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        (x, positions, cos, sin),
        attrs={"interleaved": int(interleaved)},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def count_up(total: Tensor, like: Tensor) -> Tensor:
    """0, 1, .. total - 1 of a number int32 [] that the run decides; its size is at most that of `like` [B, H, C, D]'s caches."""
    start, step = (torch.full((), n, dtype=total.dtype) for n in (0, 1))
    return torch.onnx.ops.symbolic("Range", (start, total, step), dtype=total.dtype, shape=(like.shape[2],), version=11)


def group_query_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
) -> list[Tensor]:
    """com.microsoft::GroupQueryAttention: causal attention over a cache, which may be shared by past and present.

    q [B, S, Hq*D], k and v [B, S, Hk*D]; or q [B, S, (Hq+2*Hk)*D] alone, packed. past_key, past_value [B, Hk, C, D].
    seqlens_k int32 [B], tokens in the cache after the step minus one; total int32 [], the largest number of them. cos, sin
    [positions, D/2]: rotary embedding in the op. bias [B, Hq, S, total] is added to scores. window: how far a query looks
    back, -1 without bound.
    -> [B, S, Hq*D], present_key, present_value. With several tokens behind a past, onnxruntime takes one row only.
    """
    width = past_key.shape[3]
    attrs: dict[str, Any] = {
        "num_heads": num_heads,
        "kv_num_heads": kv_heads,
        "scale": scale,
        "local_window_size": window + 1 if window >= 0 else -1,
    }
    attrs |= {"softcap": softcap} if softcap else {}
    inputs: tuple[Tensor | None, ...] = (q, k, v, past_key, past_value, seqlens_k, total)
    if cos is not None:
        attrs |= {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
        inputs = (*inputs, cos, sin)
    if bias is not None:
        inputs = (*inputs, *([None] * (10 - len(inputs))), bias)
    return list(
        torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attrs=attrs,
            dtypes=(q.dtype, past_key.dtype, past_value.dtype),
            shapes=((*q.shape[:2], num_heads * width), past_key.shape, past_value.shape),
            version=1,
        )
    )
