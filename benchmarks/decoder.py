"""A decoder that is the same for every way of batching, and these ways: padded, nested, packed.

Learned positions, pre-norm blocks of attention and a GELU of four times the width, LayerNorm without bias. A `Layout` says
how texts become a batch (in the loader's processes), how a batch becomes the model's inputs (in the step), and how
attention runs. q, k and v come as [.., heads, width], tokens before heads, and go back so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attention_peers import block_diagonal, compiled_flex, document_mask, varlen_attn
from contenders import LeftOut, need
from tilecut import attention_varlen, pack, pad_to_longest
from tilecut.collate import IGNORED


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    layers: int
    width: int
    heads: int
    head_width: int
    neurons: int
    vocabulary: int
    positions: int

    def halved(self) -> Shape:
        """With half of the heads and neurons, as pruning leaves it."""
        return Shape(
            self.layers,
            self.width,
            self.heads // 2,
            self.head_width,
            self.neurons // 2,
            self.vocabulary,
            self.positions,
        )


class Context(NamedTuple):
    """What attention knows of a batch: `mask` is whatever the layout's library takes."""

    causal: bool
    cu_seqlens: Tensor | None = None
    longest: int = 0
    mask: Any = None


class Inputs(NamedTuple):
    """Of one forward: ids and positions [.., tokens], labels for the same token (shifted before), -100 where none."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    context: Context


Attend = Callable[[Tensor, Tensor, Tensor, Context], Tensor]


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and beside a residual."""

    def __init__(self, shape: Shape, attend: Attend):
        super().__init__()
        inner = shape.heads * shape.head_width
        self.sizes, self.attend = (shape.heads, shape.head_width), attend
        self.norm, self.norm2 = (nn.LayerNorm(shape.width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(shape.width, 3 * inner), nn.Linear(inner, shape.width)
        self.up, self.down = nn.Linear(shape.width, shape.neurons), nn.Linear(shape.neurons, shape.width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (y.unflatten(-1, self.sizes) for y in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(self.attend(q, k, v, context).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Inputs -> the loss of every token, flat; 0 where there is no label."""

    def __init__(self, shape: Shape, attend: Attend):
        super().__init__()
        self.tokens, self.places = (nn.Embedding(n, shape.width) for n in (shape.vocabulary, shape.positions))
        self.blocks = nn.ModuleList([Block(shape, attend) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor, context: Context) -> Tensor:
        x = self.tokens(ids) + self.places(positions)
        for block in self.blocks:
            x = block(x, context)
        logits = self.head(self.norm(x))
        if logits.is_nested:
            logits = logits.values()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)


@dataclass(frozen=True)
class Layout:
    """One way of batching.

    `collate` takes texts to a batch on the CPU; `prepare` a batch, causal or not, and the device to `Inputs`; `attend`
    gives the attention for a model that will be compiled or not, or raises `Missing`.
    """

    collate: Callable[..., Any]
    prepare: Callable[[dict[str, Any], bool, torch.device], Inputs]
    attend: Callable[[bool, torch.device], Attend]


def padded(batch: dict[str, Any], causal: bool, device: torch.device) -> Inputs:
    """[B, S]; padding is on the right, where a causal mask hides it from every text."""
    ids, labels, keep = (
        batch[name].to(device, non_blocking=True) for name in ("input_ids", "labels", "attention_mask")
    )
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    return Inputs(ids, positions, labels, Context(causal, mask=None if causal else keep.bool()[:, None, None, :]))


def packed(batch: dict[str, Any], causal: bool, device: torch.device) -> Inputs:
    """[T]."""
    names = ("input_ids", "position_ids", "labels")
    ids, positions, labels = (batch[name][0].to(device, non_blocking=True) for name in names)
    bounds = batch["cu_seqlens"].to(device, non_blocking=True)
    return Inputs(ids, positions, labels, Context(causal, bounds, batch["max_length"]))


def nested(batch: dict[str, Any], causal: bool, device: torch.device) -> Inputs:
    """[B, ragged]."""
    held = packed(batch, causal, device)
    assert held.context.cu_seqlens is not None
    offsets = held.context.cu_seqlens.to(torch.int64)
    ids, positions = (
        torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=1, max_seqlen=held.context.longest)
        for x in held[:2]
    )
    return Inputs(ids, positions, held.labels, Context(causal))


def documents(batch: dict[str, Any], causal: bool, device: torch.device) -> Inputs:
    """[T], with FlexAttention's mask."""
    held = packed(batch, causal, device)
    assert held.context.cu_seqlens is not None
    mask = document_mask(held.context.cu_seqlens, len(held.ids), causal, _mask_maker(device.type))
    return held._replace(context=Context(causal, mask=mask))


@functools.cache
def _mask_maker(device: str) -> Callable[..., Any]:
    """Compiled, the mask of T x T is never made whole."""
    return torch.compile(create_block_mask) if device == "cuda" else create_block_mask


def diagonal(batch: dict[str, Any], causal: bool, device: torch.device) -> Inputs:
    """[T], with the bias of xFormers."""
    held = packed(batch, causal, device)
    bias = block_diagonal(batch["cu_seqlens"].diff().tolist(), causal)
    return held._replace(context=Context(causal, mask=bias))


def sdpa(compiled: bool, device: torch.device) -> Attend:
    """torch's attention on whatever backend it chooses."""

    def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, context.mask, is_causal=context.causal).transpose(1, 2)

    return attend


def nested_sdpa(compiled: bool, device: torch.device) -> Attend:
    """torch's attention on nested tensors, which on a CPU wants copies."""
    call = sdpa(compiled, device)
    if device.type == "cuda":
        return call
    return lambda q, k, v, context: call(q.contiguous(), k.contiguous(), v.contiguous(), context)


def torch_varlen(compiled: bool, device: torch.device) -> Attend:
    """`varlen_attn`."""
    # Looked up here: what is not there is said before a model is made.
    calls = {causal: varlen_attn(causal) for causal in (False, True)}

    def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        bounds, longest = context.cu_seqlens, context.longest
        return calls[context.causal](q, k, v, cu_seq_q=bounds, cu_seq_k=bounds, max_q=longest, max_k=longest)

    return attend


def flash_attn(compiled: bool, device: torch.device) -> Attend:
    """The flash-attn package."""
    call = need("flash_attn").flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        bounds, longest = context.cu_seqlens, context.longest
        return call(
            q,
            k,
            v,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=context.causal,
        )

    return attend


def xformers(compiled: bool, device: torch.device) -> Attend:
    """xFormers."""
    call = need("xformers.ops").memory_efficient_attention
    return lambda q, k, v, context: call(q[None], k[None], v[None], attn_bias=context.mask)[0]


def flex(compiled: bool, device: torch.device) -> Attend:
    """FlexAttention: compiled with the model, or else by itself."""
    call = flex_attention if compiled else compiled_flex(device, dynamic=None)
    if compiled and device.type != "cuda":
        raise LeftOut("compiled, it is for a GPU")

    def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return call(q, k, v, block_mask=context.mask)[0].transpose(0, 1)

    return attend


def tilecut(compiled: bool, device: torch.device) -> Attend:
    """Ours."""

    def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        bounds, longest = context.cu_seqlens, context.longest
        assert bounds is not None
        causal = "top_left" if context.causal else "none"
        return attention_varlen(q, k, v, bounds, bounds, max_q=longest, max_k=longest, causal=causal)[0]

    return attend


def layouts(longest: int) -> dict[str, Layout]:
    """All of them, for texts of at most `longest` tokens."""
    end_to_end = functools.partial(pack, bounds="tilecut", next_token=False)
    return {
        "SDPA, padded": Layout(functools.partial(pad_to_longest, multiple_of=longest), padded, sdpa),
        # Of eight: some backends take no other mask.
        "SDPA, pad to longest": Layout(functools.partial(pad_to_longest, multiple_of=8), padded, sdpa),
        "NestedTensor": Layout(end_to_end, nested, nested_sdpa),
        "FlexAttention": Layout(functools.partial(end_to_end, multiple_of=128), documents, flex),
        "varlen_attn": Layout(end_to_end, packed, torch_varlen),
        "flash_attn": Layout(end_to_end, packed, flash_attn),
        "xFormers": Layout(end_to_end, diagonal, xformers),
        "tilecut": Layout(end_to_end, packed, tilecut),
    }
