"""`tilecut::attention`: the one attention op of the compiler. torch only; imported only where torch is wanted.

Query head h reads KV head h // (Hq / Hk). A key is visible to a query when every mask lets it through:

    key_padding   key_padding[b, j] is True
    causal        j <= i + shift, with shift = 0 ("top_left") or Sk - Sq ("bottom_right")
    window        -left <= j - (i + shift) <= right, a negative side being unbounded
    global_tokens the first `global_tokens` positions see and are seen by all, whatever the window says

and the score of a visible pair is `softcap * tanh(q k^T scale / softcap)` (plain when softcap is 0) plus `bias` plus
`-alibi_slopes[h] * |i + shift - j|`. Softmax runs in float32 (float64 for float64 inputs). A row that sees no key
gives 0.

`attention_naive` is the meaning and the test reference; the registered op adds a fake kernel (shapes only) and the
closed-form backward of softmax attention (Dao et al., FlashAttention, arXiv 2205.14135, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilecut_runtime.errors import InputError

CAUSAL = ("none", "top_left", "bottom_right")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: str = "none",
    window: Sequence[int] = (-1, -1),
    global_tokens: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention as one op, `torch.ops.tilecut.attention`.

    Args:
        q: [B, Hq, Sq, D]; k: [B, Hk, Sk, D]; v: [B, Hk, Sk, E]; one floating dtype; Hq a multiple of Hk.
        key_padding: bool [B, Sk], True keeps the key; or None.
        bias: added to the scores, [B|1, Hq|1, Sq, Sk]; or None.
        alibi_slopes: [Hq], positive; or None.
        scale: of q k^T; None is D ** -0.5.
        causal, window, global_tokens, softcap: see the module.
        dropout_p: must be 0; dropout is not implemented.

    Returns:
        [B, Hq, Sq, E], q's dtype.

    Raises:
        InputError: shapes, dtypes or options that do not fit.
    """
    _check(q, k, v, key_padding, bias, alibi_slopes, causal, window, dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.tilecut.attention(
        q,
        k,
        v,
        key_padding,
        bias,
        alibi_slopes,
        scale=scale,
        causal=causal,
        window=list(window),
        global_tokens=global_tokens,
        softcap=softcap,
        dropout_p=dropout_p,
    )


def attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    scale: float,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
    softcap: float,
    dropout_p: float,
) -> Tensor:
    """What `tilecut::attention` means, in plain torch."""
    weights, _ = _weights(q, k, key_padding, bias, alibi_slopes, scale, causal, window, global_tokens, softcap)
    return (weights @ _repeat_kv(v, q).to(weights.dtype)).to(q.dtype)


def _weights(
    q, k, key_padding, bias, alibi_slopes, scale, causal, window, global_tokens, softcap
) -> tuple[Tensor, Tensor | None]:
    """Attention weights [B, Hq, Sq, Sk] and, with a soft-cap, tanh of the capped scores."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(wide) @ _repeat_kv(k, q).to(wide).transpose(-1, -2)) * scale
    capped = None
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores = capped * softcap
    sq, sk = q.shape[-2], k.shape[-2]
    shift = 0 if causal == "top_left" else sk - sq
    # How far the key lies behind the query.
    behind = torch.arange(sq, device=q.device)[:, None] + shift - torch.arange(sk, device=q.device)[None, :]
    if bias is not None:
        scores = scores + bias.to(wide)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[:, None, None] * behind.abs()
    visible = torch.ones_like(behind, dtype=torch.bool)
    left, right = window
    if left >= 0:
        visible = visible & (behind <= left)
    if right >= 0:
        visible = visible & (-behind <= right)
    if global_tokens:
        is_global = torch.arange(sk, device=q.device)[None, :] < global_tokens
        sees_all = (torch.arange(sq, device=q.device)[:, None] + shift) < global_tokens
        visible = visible | is_global | sees_all
    if causal != "none":
        visible = visible & (behind >= 0)
    visible = visible[None, None]
    if key_padding is not None:
        visible = visible & key_padding[:, None, None, :]
    scores = scores.masked_fill(~visible, float("-inf"))
    # softmax of an empty row is 0, not NaN: subtract a finite maximum and divide by at least the smallest positive sum
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0), capped


def _repeat_kv(x: Tensor, q: Tensor) -> Tensor:
    """KV heads repeated to q's head count: [B, Hk, S, D] -> [B, Hq, S, D]."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _check(q, k, v, key_padding, bias, alibi_slopes, causal, window, dropout_p) -> None:
    where = "tilecut.attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputError(where, f"{name} has the wrong rank", got=list(x.shape), wanted="[B, H, S, D]")
        if x.dtype != q.dtype or x.device != q.device:
            raise InputError(
                where,
                f"{name} differs from q in dtype or device",
                got=f"{x.dtype} on {x.device}",
                wanted=f"{q.dtype} on {q.device}",
            )
    if not q.dtype.is_floating_point:
        raise InputError(where, "q, k, v must be floating point", got=q.dtype)
    b, hq, sq, d = q.shape
    hk, sk = k.shape[1], k.shape[2]
    if k.shape[0] != b or k.shape[3] != d:
        raise InputError(where, "k does not fit q", got=list(k.shape), wanted=f"[{b}, Hk, Sk, {d}]")
    if tuple(v.shape[:3]) != tuple(k.shape[:3]):
        raise InputError(where, "v does not fit k", got=list(v.shape), wanted=f"[{b}, {hk}, {sk}, E]")
    if hk == 0 or hq % hk:
        raise InputError(
            where,
            "query heads are no multiple of KV heads",
            got=f"{hq} query heads, {hk} KV heads",
            fix="repeat or prune KV groups evenly",
        )
    if key_padding is not None and (key_padding.dtype != torch.bool or tuple(key_padding.shape) != (b, sk)):
        raise InputError(
            where,
            "key_padding does not fit",
            got=f"{key_padding.dtype} {list(key_padding.shape)}",
            wanted=f"torch.bool [{b}, {sk}]",
        )
    if bias is not None and (bias.ndim != 4 or any(s not in (1, w) for s, w in zip(bias.shape, (b, hq, sq, sk)))):
        raise InputError(
            where,
            "bias does not broadcast to the scores",
            got=list(bias.shape),
            wanted=f"[{b}|1, {hq}|1, {sq}|1, {sk}|1]",
        )
    if alibi_slopes is not None and tuple(alibi_slopes.shape) != (hq,):
        raise InputError(where, "alibi_slopes does not fit", got=list(alibi_slopes.shape), wanted=f"[{hq}]")
    if causal not in CAUSAL:
        raise InputError(where, "unknown causal", got=repr(causal), wanted=" or ".join(CAUSAL))
    if len(window) != 2:
        raise InputError(where, "window must be (left, right)", got=list(window))
    if dropout_p:
        raise InputError(where, "dropout is not implemented", got=dropout_p, wanted=0.0)


@torch.library.custom_op("tilecut::attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    scale: float,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
    softcap: float,
    dropout_p: float,
) -> Tensor:
    _check(q, k, v, key_padding, bias, alibi_slopes, causal, window, dropout_p)
    return attention_naive(
        q,
        k,
        v,
        key_padding,
        bias,
        alibi_slopes,
        scale=scale,
        causal=causal,
        window=window,
        global_tokens=global_tokens,
        softcap=softcap,
        dropout_p=dropout_p,
    )


@_attention_op.register_fake
def _(q, k, v, key_padding, bias, alibi_slopes, *, scale, causal, window, global_tokens, softcap, dropout_p):
    return q.new_empty((*q.shape[:3], v.shape[-1]))


@torch.library.custom_op("tilecut::attention_backward", mutates_args=())
def _attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    scale: float,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, capped = _weights(q, k, key_padding, bias, alibi_slopes, scale, causal, window, global_tokens, softcap)
    grad = grad.to(weights.dtype)
    keys, values = (_repeat_kv(x, q).to(weights.dtype) for x in (k, v))
    d_values = weights.transpose(-1, -2) @ grad
    d_weights = grad @ values.transpose(-1, -2)
    # rowsum(dP * P) = rowsum(dO * O)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True))
    d_bias = d_scores.sum_to_size(bias.shape).to(bias.dtype) if bias is not None else q.new_empty(0)
    if capped is not None:
        d_scores = d_scores * (1 - capped * capped)
    d_scores = d_scores * scale
    d_keys = d_scores.transpose(-1, -2) @ q.to(weights.dtype)

    def to_groups(x: Tensor, like: Tensor) -> Tensor:
        b, _, s, d = x.shape
        return x.reshape(b, like.shape[1], -1, s, d).sum(2).to(like.dtype)

    return (d_scores @ keys).to(q.dtype), to_groups(d_keys, k), to_groups(d_values, v), d_bias


@_attention_backward_op.register_fake
def _(grad, q, k, v, key_padding, bias, alibi_slopes, *, scale, causal, window, global_tokens, softcap):
    d_bias = torch.empty_like(bias) if bias is not None else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.options = {k: v for k, v in keyword_only_inputs.items() if k != "dropout_p"}


def _backward(ctx, grad):
    q, k, v, key_padding, bias, slopes = ctx.saved_tensors
    dq, dk, dv, d_bias = torch.ops.tilecut.attention_backward(
        grad.contiguous(), q, k, v, key_padding, bias, slopes, **ctx.options
    )
    return dq, dk, dv, None, d_bias if bias is not None else None, None


torch.library.register_autograd("tilecut::attention", _backward, setup_context=_setup_context)
