"""The naive twin of both attention ops: scores, visibility, softmax and its gradient as [B, H, Sq, Sk] tensors. torch only.

The rules are those of `attention.py`'s docstring. `allowed` restricts visibility further; `attention_varlen.py` makes it
of its KV blocks. The gradient is the closed form of softmax attention (Dao et al., FlashAttention, arXiv 2205.14135,
appendix B), with the weights rebuilt from the log-sum-exp of the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilecut_runtime.philox import dropout_mask


class Options(NamedTuple):
    """What an attention is told in numbers; the op's keywords of the same names."""

    scale: float
    causal: str
    window: Sequence[int]
    global_tokens: int
    softcap: float
    dropout_p: float


class Masks(NamedTuple):
    """What an attention is told in tensors, each of them or None; and where its dropout mask starts.

    key_padding: bool [B, Sk]; bias: [B|1, Hq|1, Sq|1, Sk|1]; alibi_slopes: [Hq]; allowed: bool [Hq|1, Sq, Sk];
    dropout_seed: int64 [1]. first_row is the number of batch row 0; max_k as `philox.dropout_mask` takes it.
    """

    key_padding: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    allowed: Tensor | None = None
    dropout_seed: Tensor | None = None
    first_row: int = 0
    max_k: int = 0


def forward(q: Tensor, k: Tensor, v: Tensor, masks: Masks, options: Options) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, E] in q's dtype, and log-sum-exp of the scores [B, Hq, Sq] in the dtype of the softmax."""
    scores, _ = _scores(q, k, masks, options)
    lse = torch.logsumexp(scores, -1)
    # A softmax over no key is NaN; its row is 0 here.
    weights = torch.softmax(scores, -1).masked_fill((lse == float("-inf"))[..., None], 0.0)
    if options.dropout_p:
        weights = weights * _dropout(q, k, masks, options)
    return (weights @ _repeat_kv(v, q).to(weights.dtype)).to(q.dtype), lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    masks: Masks,
    options: Options,
    bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, where it is asked for, of the bias, in their dtypes."""
    scores, capped = _scores(q, k, masks, options)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    grad = grad.to(weights.dtype)
    keys, values = (_repeat_kv(x, q).to(weights.dtype) for x in (k, v))
    d_weights = grad @ values.transpose(-1, -2)
    dropped = weights
    if options.dropout_p:
        dropout = _dropout(q, k, masks, options)
        dropped, d_weights = weights * dropout, d_weights * dropout
    d_values = dropped.transpose(-1, -2) @ grad
    # rowsum(dP * P) = rowsum(dO * O)
    d_scores = weights * (d_weights - (grad * out.to(weights.dtype)).sum(-1, keepdim=True))
    d_bias = None
    if bias_grad and masks.bias is not None:
        d_bias = d_scores.sum_to_size(masks.bias.shape).to(masks.bias.dtype)
    if capped is not None:
        d_scores = d_scores * (1 - capped * capped)
    d_scores = d_scores * options.scale
    d_keys = d_scores.transpose(-1, -2) @ q.to(weights.dtype)
    return (d_scores @ keys).to(q.dtype), _sum_groups(d_keys, k), _sum_groups(d_values, v), d_bias


def _scores(q: Tensor, k: Tensor, masks: Masks, options: Options) -> tuple[Tensor, Tensor | None]:
    """Scores [B, Hq, Sq, Sk], -inf where a key is not visible; with a soft-cap also tanh of the capped ones."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(wide) @ _repeat_kv(k, q).to(wide).transpose(-1, -2)) * options.scale
    capped = None
    if options.softcap:
        capped = torch.tanh(scores / options.softcap)
        scores = capped * options.softcap
    if masks.bias is not None:
        scores = scores + masks.bias.to(wide)
    behind = _behind(q, k, options.causal)
    if masks.alibi_slopes is not None:
        scores = scores - masks.alibi_slopes.to(wide)[:, None, None] * behind.abs()
    visible = _visible(behind, options)[None, None]
    if masks.key_padding is not None:
        visible = visible & masks.key_padding[:, None, None, :]
    if masks.allowed is not None:
        visible = visible & masks.allowed
    return scores.masked_fill(~visible, float("-inf")), capped


def _behind(q: Tensor, k: Tensor, causal: str) -> Tensor:
    """How far each key lies behind each query, integers [Sq, Sk]."""
    sq, sk = q.shape[-2], k.shape[-2]
    shift = 0 if causal == "top_left" else sk - sq
    return torch.arange(sq, device=q.device)[:, None] + shift - torch.arange(sk, device=q.device)


def _visible(behind: Tensor, options: Options) -> Tensor:
    """What the position of a pair says about it, bool [Sq, Sk]."""
    visible = torch.ones_like(behind, dtype=torch.bool)
    left, right = options.window
    if left >= 0:
        visible = visible & (behind <= left)
    if right >= 0:
        visible = visible & (-behind <= right)
    if options.global_tokens:
        key = torch.arange(behind.shape[1], device=behind.device)
        # The query's place among the keys is how far key 0 lies behind it.
        query = behind + key
        visible = visible | (key < options.global_tokens) | (query < options.global_tokens)
    return visible if options.causal == "none" else visible & (behind >= 0)


def _dropout(q: Tensor, k: Tensor, masks: Masks, options: Options) -> Tensor:
    """What dropout multiplies the weights by: 0, or 1 / (1 - dropout_p)."""
    assert masks.dropout_seed is not None
    b, hq, sq, _ = q.shape
    streams = (torch.arange(b * hq, device=q.device) + masks.first_row * hq).view(b, hq)
    kept = dropout_mask(masks.dropout_seed, streams, masks.max_k, sq, k.shape[-2], options.dropout_p)
    return kept.to(torch.float64 if q.dtype == torch.float64 else torch.float32) / (1 - options.dropout_p)


def _repeat_kv(x: Tensor, q: Tensor) -> Tensor:
    """KV heads repeated to q's head count: [B, Hk, S, D] -> [B, Hq, S, D]."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _sum_groups(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the query heads of a group: [B, Hq, S, D] -> [B, Hk, S, D], in the dtype of `like`."""
    return x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
