"""What hides the pairs of packed sequences, and ALiBi, as one additive bias or a mask, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilecut_targets.window_bias import outside_window


def packed_bias(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
) -> Tensor:
    """[1, 1, Tq, Tk] of the dtype of q [Tq, Hq, D], or [1, Hq, Tq, Tk] with slopes [Hq].

    Half of the least number, as `finite` has it, where a query does not see a key: of another sequence, or hidden by
    causality or the window, which are counted within the sequence.
    """
    hidden, behind = _hidden_and_behind(q, k, cu_seqlens_q, cu_seqlens_k, causal, window, global_tokens)
    bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)[None]
    if alibi_slopes is not None:
        bias = bias - alibi_slopes.to(q.dtype)[:, None, None] * behind.abs().to(q.dtype)
    return bias.masked_fill(hidden, torch.finfo(q.dtype).min / 2)[None]


def packed_hidden(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
) -> Tensor:
    """The pairs that a bias without slopes hides, bool [1, 1, Tq, Tk]."""
    return _hidden_and_behind(q, k, cu_seqlens_q, cu_seqlens_k, causal, window, global_tokens)[0][None, None]


def _hidden_and_behind(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Which pairs are hidden, and how far each key lies behind each query of its sequence: [Tq, Tk]."""
    of_q, of_k = sequence_of(cu_seqlens_q, q.shape[0]), sequence_of(cu_seqlens_k, k.shape[0])
    query = torch.arange(q.shape[0], device=q.device) - cu_seqlens_q[of_q]
    key = torch.arange(k.shape[0], device=k.device) - cu_seqlens_k[of_k]
    if causal != "top_left":
        query = query + (cu_seqlens_k.diff() - cu_seqlens_q.diff())[of_q]
    behind = query[:, None] - key[None, :]
    hidden = of_q[:, None] != of_k[None, :]
    if max(window) >= 0:
        hidden = hidden | outside_window(behind, window, global_tokens, key)
    if causal != "none":
        hidden = hidden | (behind < 0)
    return hidden, behind


def sequence_of(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The number of the sequence that each row lies in, [T]: how many sequences have ended before it."""
    place = torch.arange(rows, device=cu_seqlens.device)
    return (cu_seqlens[None, 1:] <= place[:, None]).sum(1)


def sees_a_key(out: Tensor, bias: Tensor) -> Tensor:
    """The attention's result [Tq, Hq, E], 0 for a query that sees no key."""
    seen = (bias[0, 0] > torch.finfo(bias.dtype).min / 4).any(-1)
    return torch.where(seen[:, None, None], out, torch.zeros_like(out))
