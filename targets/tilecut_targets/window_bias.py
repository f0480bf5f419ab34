"""A window and global tokens in plain torch: the pairs that they hide, and these as an additive bias, for targets whose
fused attention takes a bias and no window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keys_behind(q: Tensor, k: Tensor, causal: str) -> Tensor:
    """How far each key [B, H, Sk, D] lies behind each query [B, H, Sq, D], integers [Sq, Sk]."""
    sq, sk = q.shape[-2], k.shape[-2]
    shift = 0 if causal == "top_left" else sk - sq
    return torch.arange(sq, device=q.device)[:, None] + shift - torch.arange(sk, device=q.device)[None, :]


def outside_window(behind: Tensor, window: Sequence[int], global_tokens: int, key: Tensor | None = None) -> Tensor:
    """The pairs that the window hides, global tokens left out, bool [Sq, Sk]; `key` [Sk] is where the keys stand."""
    left, right = window
    outside = torch.zeros_like(behind, dtype=torch.bool)
    if left >= 0:
        outside = outside | (behind > left)
    if right >= 0:
        outside = outside | (-behind > right)
    if global_tokens:
        key = torch.arange(behind.shape[1], device=behind.device) if key is None else key
        # The query's place among the keys is how far key 0 lies behind it.
        outside = outside & (key >= global_tokens) & (behind + key >= global_tokens)
    return outside


def window_bias(q: Tensor, k: Tensor, causal: str, window: Sequence[int], global_tokens: int) -> Tensor:
    """[1, 1, Sq, Sk] of q's dtype: half of the least number, as `finite` has it, where the window hides, else 0."""
    hidden = outside_window(keys_behind(q, k, causal), window, global_tokens)
    zeros = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    return zeros.masked_fill(hidden, torch.finfo(q.dtype).min / 2)[None, None]
