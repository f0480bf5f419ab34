"""`tilecut::attention_varlen`: attention over sequences packed one after another, without padding. torch only.

Rows cu_seqlens_q[n] : cu_seqlens_q[n+1] of q are the queries of sequence n, and likewise of k and v; no row sees another
sequence. Scores and visibility are those of `attention.py`, with every position, Sq and Sk counted within the sequence.

A block list restricts visibility further: query blocks of 64 rows are numbered through all sequences, KV blocks of 64
within their own, and a pair is visible only if its KV block is listed for its query block:

    block_indices[block_offsets[h, b] : block_offsets[h, b + 1]]    the KV blocks of query block b, rising; h is 0 where
                                                                    block_offsets has one row for all heads

The lists lie one after another, those of head 0 first, and fill block_indices.

CPU tensors run a loop over the sequences that calls the twin of `tilecut::attention`; CUDA tensors run the Triton
kernels of `launch_attention`; other devices have no implementation, and torch says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tilecut_runtime import naive_attention
from tilecut_runtime.attention import (
    autocast,
    contiguous,
    differentiable_where_needed,
    draw_seed,
    last_contiguous,
    refuse_slopes,
    wide,
)
from tilecut_runtime.attention_checks import check_packed, check_packed_values, eager_call
from tilecut_runtime.transpose_blocks import BLOCK


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_offsets: Tensor | None = None,
    block_indices: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    max_q: int,
    max_k: int,
    scale: float | None = None,
    causal: str = "none",
    window: Sequence[int] = (-1, -1),
    global_tokens: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed attention as one op, `torch.ops.tilecut.attention_varlen`.

    Args:
        q: [Tq, Hq, D]; k: [Tk, Hk, D]; v: [Tk, Hk, E]; dtypes and head counts as `attention` takes them.
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1], from 0, not decreasing, to Tq and Tk. A sequence may be empty.
        block_offsets: int32 [Hq|1, query blocks + 1]; block_indices: int32 [listed blocks]; see the module; or None.
        alibi_slopes: floating point [Hq], positive; or None. Gets no gradient.
        max_q, max_k: at least the longest sequence's queries and keys. Dropout counts the pairs by max_k.
        scale, causal, window, global_tokens, softcap, dropout_p, dropout_seed: as `attention` takes them.

    Returns:
        out [Tq, Hq, E] in q's dtype, and lse [Hq, Tq]: the natural log-sum-exp of the scores, -inf in a row that sees no
        key, float32 (float64 for float64 inputs), without dropout and without a gradient.

    Raises:
        InputError: shapes, dtypes, devices, options, sequences or blocks that do not fit.
    """
    q, k, v = autocast(q, k, v)
    options = {
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "causal": causal,
        "window": list(window),
        "global_tokens": global_tokens,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "dropout_seed": draw_seed(q) if dropout_p and dropout_seed is None else dropout_seed,
    }
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes)
    check_packed(*packed, **options)
    if torch.compiler.is_compiling():
        return torch.ops.tilecut.attention_varlen(*packed, max_q=max_q, max_k=max_k, **options)
    with eager_call():
        return torch.ops.tilecut.attention_varlen(*packed, max_q=max_q, max_k=max_k, **options)


def _sequences(
    q, k, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, dropout_seed, max_k
) -> Iterator[tuple[slice, slice, naive_attention.Masks]]:
    """Of each sequence: its rows of q, its rows of k, and what restricts its pairs."""
    first_block = 0
    bounds = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()))
    for n, (rows, keys) in enumerate(bounds):
        sq, sk = rows[1] - rows[0], keys[1] - keys[0]
        allowed = None
        if block_offsets is not None:
            allowed = _allowed(block_offsets, block_indices, first_block, sq, sk)
            first_block += -(-sq // BLOCK)
        masks = naive_attention.Masks(None, None, alibi_slopes, allowed, dropout_seed, first_row=n, max_k=max_k)
        yield slice(*rows), slice(*keys), masks


def _allowed(block_offsets: Tensor, block_indices: Tensor, first_block: int, sq: int, sk: int) -> Tensor:
    """Which pairs of one sequence lie in a listed block, bool [Hq|1, sq, sk]."""
    blocks = torch.zeros(len(block_offsets), -(-sq // BLOCK), -(-sk // BLOCK), dtype=torch.bool)
    for head, offsets in enumerate(block_offsets.tolist()):
        for block in range(blocks.shape[1]):
            low, high = offsets[first_block + block : first_block + block + 2]
            blocks[head, block, block_indices[low:high].long()] = True
    return blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :sq, :sk]


def _heads_first(x: Tensor, rows: slice) -> Tensor:
    """One sequence as a batch of one: [T, H, D] -> [1, H, S, D]."""
    return x[rows].transpose(0, 1)[None]


def _forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, *, max_q, max_k, dropout_seed=None, **kw
):  # fmt: skip
    """The naive twin."""
    check_packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, dropout_seed=dropout_seed, **kw
    )
    check_packed_values(q, k, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, max_q, max_k)
    out, lse = _empty(q, v)
    packed = (q, k, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, dropout_seed, max_k)
    for rows, keys, masks in _sequences(*packed):
        one, of_rows = naive_attention.forward(
            _heads_first(q, rows), _heads_first(k, keys), _heads_first(v, keys), masks, naive_attention.Options(**kw)
        )
        out[rows], lse[:, rows] = one[0].transpose(0, 1), of_rows[0]
    return out, lse


def _forward_cuda(
    q, k, v, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, *, max_q, max_k, dropout_seed=None, **kw
):  # fmt: skip
    check_packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, dropout_seed=dropout_seed, **kw
    )
    check_packed_values(q, k, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, max_q, max_k)
    # Imports triton.
    from tilecut_runtime.launch_attention import forward as launch

    tables = kernel_inputs(cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, dropout_seed)
    return launch(*last_contiguous(q, k, v), max_q=max_q, max_k=max_k, **tables, **kw)


def kernel_inputs(
    cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, dropout_seed=None
) -> dict[str, Any]:
    """The op's tensors besides q, k and v as `launch_attention.Problem` takes them."""
    return {
        "cu_q": cu_seqlens_q.contiguous(),
        "cu_k": cu_seqlens_k.contiguous(),
        "alibi_slopes": wide(alibi_slopes),
        "block_offsets": contiguous(block_offsets),
        "block_indices": contiguous(block_indices),
        "dropout_seed": dropout_seed,
    }


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes of the op's results."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=wide)


@torch.library.custom_op("tilecut::attention_varlen_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_offsets: Tensor | None,
    block_indices: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    options = naive_attention.Options(scale, causal, window, global_tokens, softcap, dropout_p)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    packed = (q, k, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, dropout_seed, max_k)
    for rows, keys, masks in _sequences(*packed):
        of_q, of_grad, of_out = (_heads_first(x, rows) for x in (q, grad, out))
        of_k, of_v = _heads_first(k, keys), _heads_first(v, keys)
        found = naive_attention.backward(of_grad, of_q, of_k, of_v, of_out, lse[None, :, rows], masks, options)
        for whole, part, place in zip((dq, dk, dv), found[:3], (rows, keys, keys)):
            whole[place] = part[0].transpose(0, 1)
    return dq, dk, dv


@_backward.register_kernel("cuda")
def _backward_cuda(
    grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, dropout_seed, **options
):  # fmt: skip
    # Imports triton.
    from tilecut_runtime.launch_attention import backward as launch

    grad, q, k, v, out = last_contiguous(grad, q, k, v, out)
    tables = kernel_inputs(cu_seqlens_q, cu_seqlens_k, block_offsets, block_indices, alibi_slopes, dropout_seed)
    dq, dk, dv, _ = launch(grad, q, k, v, out, lse, **tables, **options)
    return dq, dk, dv


@_backward.register_fake
def _(grad, q, k, v, *rest, **options):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class _Differentiable(torch.autograd.Function):
    """`tilecut::attention_varlen` where a gradient is needed."""

    @staticmethod
    def forward(ctx, *given):
        *packed, dropout_seed, options = given
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.tilecut.attention_varlen(*packed, dropout_seed=dropout_seed, **options)
        q, k, v, *tables = packed
        ctx.save_for_backward(q, k, v, out, lse, *tables, dropout_seed)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, *grads):
        if ctx.needs_input_grad[7]:
            refuse_slopes("tilecut.attention_varlen")
        found = torch.ops.tilecut.attention_varlen_backward(grads[0].contiguous(), *ctx.saved_tensors, **ctx.options)
        return (*found, *(None,) * 7)


_LIBRARY = torch.library.Library("tilecut", "FRAGMENT")
_LIBRARY.define(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? block_offsets, "
    "Tensor? block_indices, Tensor? alibi_slopes, *, SymInt max_q, SymInt max_k, float scale, str causal, SymInt[] window, "
    "SymInt global_tokens, float softcap, float dropout_p, Tensor? dropout_seed=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("attention_varlen", _forward, "CPU")
_LIBRARY.impl("attention_varlen", _forward_cuda, "CUDA")
_LIBRARY.impl("attention_varlen", differentiable_where_needed("attention_varlen", _Differentiable), "Autograd")


@torch.library.register_fake("tilecut::attention_varlen", lib=_LIBRARY)
def _(q, k, v, *tables, **options):
    return _empty(q, v)
