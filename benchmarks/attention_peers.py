"""How each library is asked for the same attention, dense and packed.

A `Call` takes q, k and v in the library's own layout, which `lay` makes of ours before the clock runs, and `unlay` turns
its result back. What depends on lengths and masks alone is made before the clock runs, too.

    ours, dense     q [B, Hq, S, D], k and v [B, Hk, S, D]
    ours, packed    q [T, Hq, D], k and v [T, Hk, D], with the bounds of the sequences

Written for torch 2.11 to 2.13; `varlen_attn` was given its window and then its groups in these versions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from contenders import Missing, need
from tilecut import attention, attention_varlen


class Call(NamedTuple):
    """One library's attention."""

    lay: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    unlay: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Dense:
    """A batch of equal lengths; `queries` of 1 is a step of decoding, where every key is visible."""

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    causal: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def grouped(self) -> bool:
        """Whether several query heads read one KV head."""
        return self.heads != self.groups


@dataclass(frozen=True)
class Packed:
    """Sequences one after another; `blocks` bool [S / 128, S / 128] says which tiles of a single one, not causal, are visible."""

    lengths: tuple[int, ...]
    heads: int
    width: int
    causal: bool
    dtype: torch.dtype
    device: torch.device
    blocks: Tensor | None = None

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [N + 1]."""
        return torch.tensor([0, *self.lengths], device=self.device).cumsum(0).to(torch.int32)

    @property
    def longest(self) -> int:
        return max(self.lengths)


def same(x: Tensor) -> Tensor:
    """A layout that is ours."""
    return x


def tokens_first(x: Tensor) -> Tensor:
    """[B, H, S, D] <-> [B, S, H, D]."""
    return x.transpose(1, 2).contiguous()


def one_row(x: Tensor) -> Tensor:
    """[T, H, D] -> [1, H, T, D]."""
    return x.transpose(0, 1)[None].contiguous()


def dense_tilecut(p: Dense) -> Call:
    """`tilecut.attention`."""
    return Call(same, functools.partial(attention, causal="top_left" if p.causal else "none"), same)


def dense_sdpa(backend: SDPBackend) -> Callable[[Dense], Call]:
    """torch's attention on one of its backends."""

    def make(p: Dense) -> Call:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=p.causal, enable_gqa=p.grouped)

        return Call(same, attend, same)

    return make


def dense_flex(p: Dense) -> Call:
    """FlexAttention, compiled for this shape on a GPU."""
    rule = lambda b, h, i, j: i >= j
    mask = create_block_mask(rule, None, None, p.queries, p.keys, device=p.device) if p.causal else None
    return Call(same, functools.partial(compiled_flex(p.device), block_mask=mask, enable_gqa=p.grouped), same)


def compiled_flex(device: torch.device, dynamic: bool | None = False) -> Callable[..., Any]:
    """`flex_attention` as it is meant to run; on a CPU, where that would take long, as it is."""
    if device.type != "cuda":
        return flex_attention
    # A limit on recompilation would silently fall back to the slow form.
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=dynamic)


def dense_varlen_attn(p: Dense) -> Call:
    """torch's packed attention on equal lengths."""
    if p.queries != p.keys and p.causal:
        raise Missing("its causal mask is at the lower right")
    cu_q, cu_k = (
        torch.arange(0, (p.batch + 1) * n, n, dtype=torch.int32, device=p.device) for n in (p.queries, p.keys)
    )
    attend = functools.partial(
        varlen_attn(p.causal, p.grouped), cu_seq_q=cu_q, cu_seq_k=cu_k, max_q=p.queries, max_k=p.keys
    )
    lay = lambda x: tokens_first(x).flatten(0, 1)
    return Call(lay, attend, lambda x: x.unflatten(0, (p.batch, -1)).transpose(1, 2))


def varlen_attn(causal: bool, grouped: bool = False) -> Callable[..., Tensor]:
    """`torch.nn.attention.varlen.varlen_attn` with the mask in the words of this torch."""
    call = need("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(call).parameters
    options: dict[str, Any] = {}
    if causal:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return functools.partial(call, **options)


def dense_flash(p: Dense) -> Call:
    """The flash-attn package."""
    call = need("flash_attn").flash_attn_func
    return Call(tokens_first, functools.partial(call, causal=p.causal), tokens_first)


DENSE: dict[str, Callable[[Dense], Call]] = {
    "tilecut": dense_tilecut,
    "SDPA flash": dense_sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": dense_sdpa(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": dense_flex,
    "varlen_attn": dense_varlen_attn,
    "flash_attn": dense_flash,
}


def packed_tilecut(p: Packed) -> Call:
    """`tilecut.attention_varlen`, with a list of blocks where there are any."""
    lists: dict[str, Any] = {}
    if p.blocks is not None:
        lists = dict(zip(("block_offsets", "block_indices"), csr(p.blocks, p.longest)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = "top_left" if p.causal else "none"
        return attention_varlen(
            q, k, v, p.cu_seqlens, p.cu_seqlens, max_q=p.longest, max_k=p.longest, causal=causal, **lists
        )[0]

    return Call(same, attend, same)


def csr(blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Visible tiles of 128 x 128 as the op's lists of 64 x 64 blocks: offsets [1, blocks + 1] and indices, int32."""
    count = -(-length // 64)
    fine = blocks.repeat_interleave(2, 0).repeat_interleave(2, 1)[:count, :count]
    offsets = torch.cat([fine.new_zeros(1, dtype=torch.int64), fine.sum(1).cumsum(0)])
    return offsets.to(torch.int32)[None], fine.nonzero()[:, 1].to(torch.int32)


def packed_varlen_attn(p: Packed) -> Call:
    """torch's own."""
    _no_blocks(p)
    attend = functools.partial(
        varlen_attn(p.causal), cu_seq_q=p.cu_seqlens, cu_seq_k=p.cu_seqlens, max_q=p.longest, max_k=p.longest
    )
    return Call(same, attend, same)


def packed_flash(p: Packed) -> Call:
    """The flash-attn package."""
    _no_blocks(p)
    call = need("flash_attn").flash_attn_varlen_func
    attend = functools.partial(
        call,
        cu_seqlens_q=p.cu_seqlens,
        cu_seqlens_k=p.cu_seqlens,
        max_seqlen_q=p.longest,
        max_seqlen_k=p.longest,
        causal=p.causal,
    )
    return Call(same, attend, same)


def packed_xformers(p: Packed) -> Call:
    """xFormers with a block-diagonal bias."""
    _no_blocks(p)
    bias = block_diagonal(p.lengths, p.causal)
    call = need("xformers.ops").memory_efficient_attention
    return Call(lambda x: x[None], functools.partial(call, attn_bias=bias), lambda x: x[0])


def block_diagonal(lengths: Sequence[int], causal: bool) -> Any:
    """xFormers' bias of packed sequences."""
    held = need("xformers.ops.fmha.attn_bias")
    kind = held.BlockDiagonalCausalMask if causal else held.BlockDiagonalMask
    return kind.from_seqlens(list(lengths))


def packed_flex(p: Packed) -> Call:
    """FlexAttention with a mask of documents, or of blocks."""
    total = sum(p.lengths)
    if p.blocks is None:
        mask = document_mask(p.cu_seqlens, total, p.causal)
    else:
        blocks = p.blocks
        rule = lambda b, h, i, j: blocks[i // 128, j // 128]
        mask = create_block_mask(rule, None, None, total, total, device=p.device)
    attend = functools.partial(compiled_flex(p.device), block_mask=mask)
    return Call(one_row, attend, lambda x: x[0].transpose(0, 1))


def document_mask(
    cu_seqlens: Tensor, total: int, causal: bool, make: Callable[..., BlockMask] = create_block_mask
) -> BlockMask:
    """FlexAttention's mask of packed sequences."""
    places = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.bucketize(places, cu_seqlens[1:], right=True)
    rule = lambda b, h, i, j: (document[i] == document[j]) & (i >= j)
    either = lambda b, h, i, j: document[i] == document[j]
    return make(rule if causal else either, None, None, total, total, device=cu_seqlens.device)


def _no_blocks(p: Packed) -> None:
    if p.blocks is not None:
        raise Missing("it takes no list of blocks")


PACKED: dict[str, Callable[[Packed], Call]] = {
    "tilecut": packed_tilecut,
    "varlen_attn": packed_varlen_attn,
    "flash_attn": packed_flash,
    "xFormers": packed_xformers,
    "FlexAttention": packed_flex,
}
