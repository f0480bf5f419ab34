"""torch_npu's fused inference attention, `torch.ops.npu.npu_fused_infer_attention_score`, wherever torch is.

A program that calls the op can only be read where the op is known. torch_npu, which torch loads by itself where it is
installed, brings its own; without it this module defines the op under the same name and schema, and on the CPU it
computes what the op means, so that such a program can be read, looked at and executed without an NPU. A layout, mode or
input that no program of tilecut uses is refused, not guessed.

The meaning, of query head h over KV head h // (num_heads / num_key_value_heads): softmax(scale q k^T) v over the pairs
that are not dropped. In `atten_mask` True means drop, the opposite of torch's own attention. `sparse_mode` says which
pairs are dropped beside or instead of it, i counting queries, j keys, and shift = Sk - Sq:

    0  those that the mask [B|1, 1, Sq, Sk] drops, none without one; and those outside pre_tokens and next_tokens, which may
       be limited with a mask and Sq = Sk only
    2  j > i           the mask is the upper triangle [2048, 2048], whatever Sq and Sk are
    3  j > i + shift   the same mask
    4  j > i + shift + next_tokens or j < i + shift - pre_tokens, the same mask

A query whose pairs are all dropped gives 0, as `tilecut::attention` does; CANN leaves it open.

Source: torch_npu 2.13.0 (schema); CANN operator library, aclnnFusedInferAttentionScore (sparseMode, attenMask).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from tilecut_runtime.errors import InputError

WHERE = "npu_fused_infer_attention_score"
# What "no limit" is called in pre_tokens and next_tokens.
ALL_TOKENS = 2147483647
# Side of the triangle that modes 2, 3 and 4 take as their mask.
TRIANGLE = 2048
LAYOUTS = ("BNSD", "BSND")
SCHEMA = (
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, "
    "Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, "
    "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
    "Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, "
    "Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None, "
    "Tensor? value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None, "
    "Tensor? kv_padding_size=None, Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, "
    "SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None, "
    "Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1., int pre_tokens=2147483647, "
    'int next_tokens=2147483647, str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, '
    "int inner_precise=0, int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0, "
    "int value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)"
)


def infer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None,
    *,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    input_layout: str,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
) -> Tensor:
    """What the op means: [B, N, S, D] (BNSD) or [B, S, N, D] (BSND) in, query's layout and dtype out; float32 inside.

    Raises:
        InputError: a layout, mode or mask that is not described above, or heads that do not fit.
    """
    if input_layout not in LAYOUTS:
        raise InputError(WHERE, "unknown input_layout", got=input_layout, wanted=" or ".join(LAYOUTS))
    if input_layout == "BSND":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    kv_heads = num_key_value_heads or num_heads
    if (query.shape[1], key.shape[1], value.shape[1]) != (num_heads, kv_heads, kv_heads) or num_heads % kv_heads:
        raise InputError(
            WHERE,
            "heads do not fit",
            got=f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)} in {input_layout}",
            wanted=f"{num_heads} and {kv_heads} heads",
        )
    keys, values = (x.float().repeat_interleave(num_heads // kv_heads, 1) for x in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * scale
    drop = dropped_pairs(atten_mask, scores, sparse_mode, pre_tokens, next_tokens)
    if drop is not None:
        scores = scores.masked_fill(drop, float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    out = (weights @ values).to(query.dtype)
    return out.transpose(1, 2).contiguous() if input_layout == "BSND" else out


def dropped_pairs(mask: Tensor | None, scores: Tensor, mode: int, before: int, after: int) -> Tensor | None:
    """The pairs of scores [B, N, Sq, Sk] that a sparse_mode drops, bool, broadcastable to them; None drops none."""
    sq, sk = scores.shape[-2:]
    shift = 0 if mode == 2 else sk - sq
    # How far each key lies ahead of its query.
    ahead = torch.arange(sk, device=scores.device) - torch.arange(sq, device=scores.device)[:, None] - shift
    outside = (ahead > after) | (-ahead > before)
    if mode == 0:
        if (before, after) != (ALL_TOKENS, ALL_TOKENS) and (mask is None or sq != sk):
            raise InputError(WHERE, "mode 0 with limited tokens and no mask, or Sq other than Sk", got=(before, after))
        if mask is not None and (mask.ndim != 4 or list(mask.shape[1:]) != [1, sq, sk]):
            raise InputError(WHERE, "mode 0 takes a whole mask", got=list(mask.shape), wanted=["B or 1", 1, sq, sk])
        return None if mask is None else mask.bool() | outside
    triangle = torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=scores.device).triu(1)
    if mode not in (2, 3, 4) or mask is None or not torch.equal(mask.bool(), triangle):
        got = f"mode {mode} with a mask {None if mask is None else list(mask.shape)}"
        raise InputError(WHERE, "unknown mode or mask", got=got, wanted=f"2, 3 or 4 with triu of {TRIANGLE}")
    return outside if mode == 4 else ahead > 0


def _on_the_cpu(
    query: Tensor, key: Tensor, value: Tensor, *, atten_mask: Tensor | None = None, **given: Any
) -> tuple[Tensor, Tensor]:
    options = {name: given.pop(name, DEFAULTS[name]) for name in OPTIONS}
    # How exact the op is inside says nothing about what it means.
    given.pop("inner_precise", None)
    # A tensor has no default.
    if unused := [name for name, one in given.items() if isinstance(one, Tensor) or one != DEFAULTS[name]]:
        raise InputError(WHERE, "an argument that the op's meaning here does not know", got=", ".join(unused))
    return infer_attention(query, key, value, atten_mask, **options), query.new_empty(0, dtype=torch.float32)


def _shapes(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(0, dtype=torch.float32)


DEFAULTS = {a.name: a.default_value for a in torch._C.parse_schema(f"npu::{SCHEMA}").arguments}
OPTIONS = (
    "num_heads",
    "num_key_value_heads",
    "scale",
    "input_layout",
    "sparse_mode",
    "pre_tokens",
    "next_tokens",
)
if "torch_npu" not in sys.modules:
    _LIBRARY = torch.library.Library("npu", "FRAGMENT")
    _LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(WHERE, _on_the_cpu, "CPU")
    torch.library.register_fake(f"npu::{WHERE}", _shapes, lib=_LIBRARY)
OP = torch.ops.npu.npu_fused_infer_attention_score.default
