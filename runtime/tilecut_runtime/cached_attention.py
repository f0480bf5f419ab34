"""`tilecut::cached_attention`: causal self-attention over a key-value cache. torch only; imported only where torch is wanted.

Row b has P = past_lengths[b] tokens in its cache of C places, and L = lengths[b] new ones: the first L of the S that are
given; what stands behind them is padding. Their keys and values go to the places P .. P + L - 1 of the cache. Query s is at
position P + s and sees the places

    max(0, P + s - window) .. P + s         window: how far it looks back; -1 is unbounded

with the score `softcap * tanh(q k^T scale / softcap)`, plain when softcap is 0, plus `distance_bias[h, min(i - j, R - 1)]`
of query head h at place i for the key at place j, where there is one. Query head h reads KV head h // (Hq / Hk).
The outputs of padding, and what present holds behind P + L, are no one's to read: here they are 0 and the past's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilecut_runtime import naive_attention
from tilecut_runtime.errors import InputError

WHERE = "tilecut.cached_attention"


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    lengths: Tensor,
    distance_bias: Tensor | None = None,
    *,
    scale: float,
    window: int = -1,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal self-attention over a cache as one op, `torch.ops.tilecut.cached_attention`.

    Args:
        q: [B, Hq, S, D]; k: [B, Hk, S, D]; v: [B, Hk, S, E]; one floating dtype; Hq a multiple of Hk.
        past_key: [B, Hk, C, D]; past_value: [B, Hk, C, E]: the cache.
        past_lengths, lengths: int64 [B].
        distance_bias: [Hq, R], what is added to scores by how far the key is behind the query; R - 1 and further alike.

    Returns:
        out [B, Hq, S, E], and the cache with the new tokens in it, [B, Hk, C, D] and [B, Hk, C, E].

    Raises:
        InputError: shapes that do not fit, or tokens beyond the cache.
    """
    check(q, k, v, past_key, past_value, past_lengths, lengths, distance_bias)
    return torch.ops.tilecut.cached_attention(
        q, k, v, past_key, past_value, past_lengths, lengths, distance_bias, scale=scale, window=window, softcap=softcap
    )


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    lengths: Tensor,
    distance_bias: Tensor | None = None,
) -> None:
    """Refuse operands that the op does not take."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[1] % k.shape[1]:
        got = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise InputError(
            WHERE, "q, k and v do not fit", got=got, wanted="[B, H, S, D], query heads a multiple of key heads"
        )
    for name, past, new in (("past_key", past_key, k), ("past_value", past_value, v)):
        wanted = [*new.shape[:2], past.shape[2] if past.ndim == 4 else "C", new.shape[3]]
        if list(past.shape) != wanted or past.dtype != new.dtype:
            raise InputError(
                WHERE, f"{name} does not fit", got=f"{list(past.shape)} {past.dtype}", wanted=f"{wanted} {new.dtype}"
            )
    for name, counts in (("past_lengths", past_lengths), ("lengths", lengths)):
        if list(counts.shape) != [q.shape[0]] or counts.dtype != torch.int64:
            raise InputError(
                WHERE,
                f"{name} does not fit",
                got=f"{list(counts.shape)} {counts.dtype}",
                wanted=f"[{q.shape[0]}] int64",
            )
    if distance_bias is not None and (
        distance_bias.ndim != 2 or distance_bias.shape[0] != q.shape[1] or not distance_bias.shape[1]
    ):
        raise InputError(
            WHERE, "distance_bias does not fit", got=list(distance_bias.shape), wanted=f"[{q.shape[1]}, distances]"
        )


def cached_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    lengths: Tensor,
    distance_bias: Tensor | None = None,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `tilecut::cached_attention` means, in plain torch."""
    step = torch.arange(q.shape[2], device=q.device)
    places = past_lengths[:, None] + step
    real = step < lengths[:, None]
    capacity = past_key.shape[2]
    if bool((real & (places >= capacity)).any()):
        most = int((past_lengths + lengths).max())
        raise InputError(WHERE, "more tokens than the cache has places", got=most, wanted=f"at most {capacity}")
    present = [past.clone() for past in (past_key, past_value)]
    rows = torch.arange(q.shape[0], device=q.device)[:, None].expand_as(places)
    for held, new in zip(present, (k, v)):
        # Two lists of places, rows and columns, choose [n, Hk, D].
        held.transpose(1, 2)[rows[real], places[real]] = new.transpose(1, 2)[real]
    behind = places[:, :, None] - torch.arange(capacity, device=q.device)
    seen = (behind >= 0) & real[:, :, None]
    if window >= 0:
        seen = seen & (behind <= window)
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf"))[:, None]
    if distance_bias is not None:
        # [B, S, C, Hq]
        bias = bias + distance_bias.T[behind.clamp(0, distance_bias.shape[1] - 1)].permute(0, 3, 1, 2)
    # Places that no token has been written to may hold anything.
    filled = torch.arange(capacity, device=q.device) < (past_lengths + lengths)[:, None]
    keys, values = (held.masked_fill(~filled[:, None, :, None], 0.0) for held in present)
    options = naive_attention.Options(scale, "none", (-1, -1), 0, softcap, 0.0)
    out, _ = naive_attention.forward(q, keys, values, naive_attention.Masks(bias=bias), options)
    return out, present[0], present[1]


@torch.library.custom_op("tilecut::cached_attention", mutates_args=())
def _cached_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    lengths: Tensor,
    distance_bias: Tensor | None = None,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check(q, k, v, past_key, past_value, past_lengths, lengths, distance_bias)
    return cached_attention_naive(
        q, k, v, past_key, past_value, past_lengths, lengths, distance_bias, scale=scale, window=window, softcap=softcap
    )


@_cached_attention_op.register_fake
def _(q, k, v, past_key, past_value, past_lengths, lengths, distance_bias=None, *, scale, window, softcap):
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, past_key.new_empty(past_key.shape), past_value.new_empty(past_value.shape)
