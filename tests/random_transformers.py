"""A grammar of small transformers: what a recipe says, the model it makes, and the groups that the compiler must find.

A `Recipe` is drawn by `recipes()`, built by `build` as plain hand-written PyTorch, and read by `expected_groups`. Sizes
coincide often, because equal sizes must not be taken for one another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from checks import randomise

VOCABULARY, CONTEXT_WIDTH, MOST_PLACES = 11, 6, 16

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip

# How the rows of the projections are laid out; those of TIED have one width for queries, keys and values.
LAYOUTS = ("separate", "chunk", "split", "per_head", "per_head_split", "grouped", "transposed", "sliced", "einsum")
CROSS_LAYOUTS = ("separate", "chunk")
TIED = ("per_head", "grouped")
# Layouts in which every query head has keys and values of its own.
UNGROUPED = ("chunk", "per_head", "per_head_split")

# "sdpa_gqa" and "grouped" leave it to the op to bring query heads and KV heads together.
CORES = ("sdpa", "sdpa_gqa", "matmul", "grouped", "bmm", "einsum")
REPEATS = ("expand", "interleave")
# Ops that stretch a single KV head over all query heads.
STRETCHING = ("sdpa", "matmul")
# How the experts of a layer are held and run.
EXPERTS = ("listed", "matmul", "einsum")
# How tokens choose experts: the best two by probability, or each expert as much as its own score says.
ROUTERS = ("topk", "sigmoid")


@dataclass(frozen=True)
class Attention:
    """`groups` KV heads with `queries` query heads each; `cross` reads keys and values from the context."""

    groups: int
    queries: int
    width: int
    value_width: int
    layout: str = "separate"
    core: str = "sdpa"
    repeat: str = "expand"
    causal: bool = False
    padding: bool = False
    rotary: str = "none"
    norm: str = "none"
    places: str = "none"
    cap: bool = False
    head_scale: bool = False
    bias: bool = True
    cross: bool = False

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.groups * self.queries

    @property
    def sizes(self) -> list[int]:
        """Rows of queries, keys and values."""
        return [self.heads * self.width, self.groups * self.width, self.groups * self.value_width]

    @property
    def rotated(self) -> int:
        """How much of the width rotary embedding turns."""
        return {"none": 0, "partial": self.width // 4 * 2}.get(self.rotary, self.width)


@dataclass(frozen=True)
class FeedForward:
    """`experts` of 0 is a dense layer; `kind` says how it is gated, `flat` that batch and sequence become one.

    `style` is how experts are held: a list of modules, or [E, in, out] weights and the op that runs them.
    """

    kind: str
    neurons: int
    act: str = "gelu"
    bias: bool = True
    flat: bool = False
    experts: int = 0
    style: str = "listed"
    router: str = "topk"


@dataclass(frozen=True)
class Layer:
    """One block; `place` is where its norms stand."""

    attention: Attention
    ffn: FeedForward
    cross: Attention | None = None
    place: str = "pre"
    norm: str = "layer"
    parallel: bool = False
    convolution: bool = False


@dataclass(frozen=True)
class Recipe:
    """A model: `head` is what it returns, `shared` uses the one layer twice, `one_table` shares T5's table of places."""

    hidden: int
    layers: tuple[Layer, ...]
    head: str = "hidden"
    positions: bool = False
    final_norm: bool = False
    shared: bool = False
    one_table: bool = False

    @property
    def attentions(self) -> list[Attention]:
        """Every attention, the ones over the context too."""
        return [a for layer in self.layers for a in (layer.attention, layer.cross) if a is not None]

    @property
    def feed_forwards(self) -> list[FeedForward]:
        """The feed-forward part of every layer."""
        return [layer.ffn for layer in self.layers]


# What the compiler must find.


def expected_groups(recipe: Recipe) -> Counter[tuple[str, int]]:
    """Kind and size of every group of the model. Fewer, or others, than a reader might expect are found where

    - `repeat_interleave` copies KV heads: the copies are a frozen factor, so queries of a KV group are no group;
    - a projection has one width for queries, keys and values ([H, 3, D], [G, R+2, D]): the widths are one group;
    - rotary embedding ties two halves, or a pair: the width is a group of half its size, or of several parts;
    - a norm runs over the width of queries and keys: it is `hidden`, which no mask cuts exactly;
    - one table of places is shared: the heads of all layers are one group;
    - the model returns its hidden state: the hidden width is frozen;
    - no norm runs over the hidden width: its kind is `neurons`;
    - experts are a list: they are frozen, their neurons are not.

    A dimension of size 1 is no group.
    """
    found = [("vocab", VOCABULARY)]
    tables = [a for a in recipe.attentions if recipe.one_table and a.places == "buckets"]
    if tables:
        found += _head_groups(tables[0], any(map(_freezes_queries, tables)))
    for attention in recipe.attentions:
        if attention not in tables:
            found += _head_groups(attention, _freezes_queries(attention))
        found += _width_groups(attention)
    for ffn in recipe.feed_forwards:
        is_list = ffn.experts > 0 and ffn.style == "listed"
        found += [("neurons", ffn.neurons)] * (ffn.experts if is_list else 1)
        found += [("experts", ffn.experts)] * (ffn.experts > 0 and not is_list)
    if recipe.head != "hidden":
        has_norm = recipe.final_norm or any(layer.place != "none" for layer in recipe.layers)
        found.append(("hidden" if has_norm else "neurons", recipe.hidden))
    return Counter((kind, size) for kind, size in found if size > 1)


def _freezes_queries(a: Attention) -> bool:
    return a.queries > 1 and a.repeat == "interleave" and a.core not in ("sdpa_gqa", "grouped")


def _head_groups(a: Attention, queries_frozen: bool) -> list[tuple[str, int]]:
    if a.groups > 1 and a.queries > 1:
        return [("kv_groups", a.groups)] + [("queries", a.queries)] * (not queries_frozen)
    return [] if queries_frozen else [("heads", a.heads)]


def _width_groups(a: Attention) -> list[tuple[str, int]]:
    """The part that rotary embedding turns, by its halves or pairs, the rest, and the width of the values."""
    values = [] if a.layout in TIED else [("vo_width", a.value_width)]
    return [("qk_width", a.rotated // 2), ("qk_width", a.width - a.rotated), *values]


# The models.


class RootMeanSquare(nn.Module):
    """RMSNorm as Llama writes it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm, "rms": RootMeanSquare, "torch_rms": nn.RMSNorm, "none": lambda width: nn.Identity(),
}  # fmt: skip


class TransposedLinear(nn.Module):
    """GPT-2's Conv1D: the weight is [in, out], and batch and sequence become one."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width, out)), nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class SeparateProjections(nn.Module):
    """Three layers; of cross attention, or two of them, over the context."""

    def __init__(self, hidden: int, a: Attention):
        super().__init__()
        source = CONTEXT_WIDTH if a.cross else hidden
        self.a = a
        self.q, self.k, self.v = (nn.Linear(n, m, a.bias) for n, m in zip((hidden, source, source), a.sizes))

    def forward(self, x: Tensor, source: Tensor) -> Iterator[Tensor]:
        return in_heads(self.a, self.q(x), self.k(source), self.v(source))


class KeysAndValues(nn.Module):
    """Queries from one layer, keys and values of the context from another."""

    def __init__(self, hidden: int, a: Attention):
        super().__init__()
        self.a = a
        self.q, self.kv = nn.Linear(hidden, a.sizes[0], a.bias), nn.Linear(CONTEXT_WIDTH, sum(a.sizes[1:]), a.bias)

    def forward(self, x: Tensor, source: Tensor) -> Iterator[Tensor]:
        return in_heads(self.a, self.q(x), *self.kv(source).chunk(2, -1))


class FusedProjection(nn.Module):
    """One layer, whose rows are cut as the layout says."""

    def __init__(self, hidden: int, a: Attention):
        super().__init__()
        self.a, rows = a, sum(a.sizes)
        self.qkv = TransposedLinear(hidden, rows) if a.layout == "transposed" else nn.Linear(hidden, rows, a.bias)

    def forward(self, x: Tensor, source: Tensor) -> Iterator[Tensor]:
        a, fused = self.a, self.qkv(x)
        b, s, _ = fused.shape
        if a.layout == "chunk":
            return in_heads(a, *fused.chunk(3, -1))
        if a.layout in ("split", "transposed"):
            return in_heads(a, *fused.split(a.sizes, -1))
        if a.layout == "per_head":
            fused = fused.view(b, s, a.heads, 3, a.width)
            parts = (fused[..., i, :] for i in range(3))
        elif a.layout == "per_head_split":
            parts = fused.view(b, s, a.heads, -1).split([a.width, a.width, a.value_width], -1)
        else:
            fused = fused.view(b, s, a.groups, a.queries + 2, a.width)
            parts = (part.flatten(2, 3) for part in (fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]))
        return (part.transpose(1, 2) for part in parts)


class SlicedProjection(nn.Module):
    """One weight that is cut before it is used, as in nn.MultiheadAttention."""

    def __init__(self, hidden: int, a: Attention):
        super().__init__()
        self.a = a
        self.in_proj_weight = nn.Parameter(torch.empty(sum(a.sizes), hidden))
        self.in_proj_bias = nn.Parameter(torch.empty(sum(a.sizes)))

    def forward(self, x: Tensor, source: Tensor) -> Iterator[Tensor]:
        q, k, _ = self.a.sizes
        rows = (slice(None, q), slice(q, q + k), slice(q + k, None))
        return in_heads(self.a, *(F.linear(x, self.in_proj_weight[r], self.in_proj_bias[r]) for r in rows))


class EinsumProjections(nn.Module):
    """Three weights of [hidden, H, D]."""

    def __init__(self, hidden: int, a: Attention):
        super().__init__()
        widths = ((a.heads, a.width), (a.groups, a.width), (a.groups, a.value_width))
        self.q, self.k, self.v = (nn.Parameter(torch.empty(hidden, h, d)) for h, d in widths)

    def forward(self, x: Tensor, source: Tensor) -> Iterator[Tensor]:
        return (torch.einsum("bsi,ihd->bhsd", x, weight) for weight in (self.q, self.k, self.v))


def in_heads(a: Attention, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
    """[B, S, H*D] -> [B, H, S, D], three times."""
    for x, width in ((q, a.width), (k, a.width), (v, a.value_width)):
        yield x.view(*x.shape[:2], -1, width).transpose(1, 2)


def projection(hidden: int, a: Attention) -> nn.Module:
    """The module that makes queries, keys and values."""
    if a.layout == "separate":
        return SeparateProjections(hidden, a)
    if a.layout == "sliced":
        return SlicedProjection(hidden, a)
    if a.layout == "einsum":
        return EinsumProjections(hidden, a)
    return KeysAndValues(hidden, a) if a.cross else FusedProjection(hidden, a)


class Rotary(nn.Module):
    """Rotary embedding of the first `width` channels: `pairs` are neighbours, else halves."""

    def __init__(self, width: int, pairs: bool):
        super().__init__()
        self.width, self.pairs = width, pairs
        self.register_buffer("frequencies", torch.empty(width // 2))

    def forward(self, x: Tensor) -> Tensor:
        if x.size(-1) > self.width:
            return torch.cat([self.turn(x[..., : self.width]), x[..., self.width :]], -1)
        return self.turn(x)

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.size(-2))[:, None] * self.frequencies
        if self.pairs:
            angles = angles.repeat_interleave(2, -1)
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        else:
            angles = torch.cat([angles, angles], -1)
            first, second = x.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        return x * angles.cos() + turned * angles.sin()


class Places(nn.Module):
    """What is added to the scores of every head for two places' distance: [H, S, S]."""

    slopes: Tensor
    table: Tensor

    def __init__(self, a: Attention):
        super().__init__()
        self.kind = a.places
        if self.kind == "alibi":
            self.register_buffer("slopes", torch.empty(a.heads))
        elif self.kind == "table":
            self.table = nn.Parameter(torch.empty(a.heads, 2 * MOST_PLACES - 1))
        else:
            self.buckets = nn.Embedding(2 * MOST_PLACES - 1, a.heads)

    def forward(self, s: int) -> Tensor:
        places = torch.arange(s)
        distance = places[None] - places[:, None]
        if self.kind == "alibi":
            return self.slopes[:, None, None] * -distance.abs()
        if self.kind == "table":
            return self.table[:, distance + MOST_PLACES - 1]
        return self.buckets(distance + MOST_PLACES - 1).permute(2, 0, 1)


class AttentionLayer(nn.Module):
    """Attention of `x` over itself or over the context."""

    def __init__(self, hidden: int, a: Attention, places: Places | None):
        super().__init__()
        self.a = a
        self.project = projection(hidden, a)
        made = a.heads * a.value_width
        self.out = TransposedLinear(made, hidden) if a.layout == "transposed" else nn.Linear(made, hidden, a.bias)
        self.q_norm, self.k_norm = NORMS[a.norm](a.width), NORMS[a.norm](a.width)
        self.rotary = Rotary(a.rotated, a.rotary == "pairs") if a.rotated else nn.Identity()
        self.places = places
        if a.head_scale:
            self.head_scale = nn.Parameter(torch.empty(a.heads, 1, 1))

    def forward(self, x: Tensor, source: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = self.project(x, source)
        q, k = self.rotary(self.q_norm(q)), self.rotary(self.k_norm(k))
        added = self.places(x.size(1)) if self.places is not None else None
        mixed = attend(self.a, q, k, v, added, keep if self.a.padding else None)
        if self.a.head_scale:
            mixed = mixed * self.head_scale
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


def attend(a: Attention, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, keep: Tensor | None) -> Tensor:
    """[B, H, S, D], [B, G, T, D], [B, G, T, E] -> [B, H, S, E]."""
    if a.core == "grouped":
        return attend_in_groups(a, q, k, v, added, keep)
    if a.core == "sdpa_gqa":
        return sdpa(a, q, k, v, added, keep, enable_gqa=True)
    k, v = repeated(a, k), repeated(a, v)
    if a.core == "sdpa":
        return sdpa(a, q, k, v, added, keep)
    if a.core == "einsum":
        weights = weights_of(a, torch.einsum("bhsd,bhtd->bhst", q, k), added, keep)
        return torch.einsum("bhst,bhte->bhse", weights, v)
    multiply = batched_matmul if a.core == "bmm" else torch.matmul
    return multiply(weights_of(a, multiply(q, k.transpose(-1, -2)), added, keep), v)


def sdpa(
    a: Attention, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, keep: Tensor | None, **options: bool
) -> Tensor:
    if added is None and keep is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=a.causal, **options)
    seen = visible(a, q, k, keep)
    if added is not None:
        seen = added[None] if seen is None else torch.where(seen, added, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, seen, **options)


def attend_in_groups(
    a: Attention, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, keep: Tensor | None
) -> Tensor:
    """KV heads stretch over the queries of their group inside the matmul."""
    scores = q.unflatten(1, (a.groups, a.queries)) @ k[:, :, None].mT
    weights = weights_of(a, scores.flatten(1, 2), added, keep).unflatten(1, (a.groups, a.queries))
    return (weights @ v[:, :, None]).flatten(1, 2)


def batched_matmul(x: Tensor, y: Tensor) -> Tensor:
    """A matmul with batch and heads as one dimension."""
    b, h = x.shape[:2]
    return torch.bmm(x.reshape(b * h, *x.shape[2:]), y.reshape(b * h, *y.shape[2:])).view(b, h, x.size(2), y.size(3))


def weights_of(a: Attention, scores: Tensor, added: Tensor | None, keep: Tensor | None) -> Tensor:
    scores = scores * a.width**-0.5
    if a.cap:
        scores = 5.0 * torch.tanh(scores / 5.0)
    if added is not None:
        scores = scores + added
    seen = visible(a, scores, scores.mT, keep)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1)


def visible(a: Attention, q: Tensor, k: Tensor, keep: Tensor | None) -> Tensor | None:
    """Which keys each query sees, as a boolean mask; None where it sees all."""
    seen = None if keep is None else (keep != 0)[:, None, None, :]
    if not a.causal:
        return seen
    triangle = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril()
    return triangle if seen is None else seen & triangle


def repeated(a: Attention, x: Tensor) -> Tensor:
    """[B, G, T, D] -> [B, G*R, T, D]."""
    if a.queries == 1 or a.repeat == "stretch":
        return x
    if a.repeat == "interleave":
        return x.repeat_interleave(a.queries, 1)
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, a.queries, t, d).reshape(b, g * a.queries, t, d)


class Dense(nn.Module):
    """One layer up, perhaps gated by another, and one down."""

    def __init__(self, hidden: int, f: FeedForward):
        super().__init__()
        self.f, fused = f, f.kind in ("gate_first", "gate_last")
        self.up = nn.Linear(hidden, f.neurons * (2 if fused else 1), f.bias)
        self.down = nn.Linear(f.neurons, hidden, f.bias)
        if f.kind == "gated":
            self.gate = nn.Linear(hidden, f.neurons, f.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.size(-1)) if self.f.flat else x
        gate = self.gate(rows) if self.f.kind == "gated" else None
        return self.down(gated(self.f, self.up(rows), gate)).view(x.shape)


def gated(f: FeedForward, made: Tensor, gate: Tensor | None) -> Tensor:
    """The activation; gated by another tensor, or one half by the other."""
    act = ACTIVATIONS[f.act]
    if f.kind == "plain":
        return act(made)
    if gate is not None:
        return act(gate) * made
    first, second = made.chunk(2, -1)
    return act(first) * second if f.kind == "gate_first" else first * act(second)


class StackedExperts(nn.Module):
    """Every expert runs on every token: weights are [E, in, out]."""

    def __init__(self, hidden: int, f: FeedForward):
        super().__init__()
        self.f, fused = f, f.kind in ("gate_first", "gate_last")
        self.up = nn.Parameter(torch.empty(f.experts, hidden, f.neurons * (2 if fused else 1)))
        self.down = nn.Parameter(torch.empty(f.experts, f.neurons, hidden))
        if f.kind == "gated":
            self.gate = nn.Parameter(torch.empty(f.experts, hidden, f.neurons))

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """[T, hidden], [T, E] -> [T, hidden]."""
        rows = rows.expand(self.f.experts, *rows.shape)
        gate = self.multiply(rows, self.gate) if self.f.kind == "gated" else None
        made = self.multiply(gated(self.f, self.multiply(rows, self.up), gate), self.down)
        return (made * chosen.t()[..., None]).sum(0)

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[E, T, in] x [E, in, out] -> [E, T, out]."""
        return torch.einsum("eti,eio->eto", rows, weight) if self.f.style == "einsum" else rows @ weight


class ListedExperts(nn.Module):
    """Every expert is a module of its own and runs on every token."""

    def __init__(self, hidden: int, f: FeedForward):
        super().__init__()
        self.experts = nn.ModuleList(Dense(hidden, f) for _ in range(f.experts))

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """[T, hidden], [T, E] -> [T, hidden]."""
        return cast(Tensor, sum(expert(rows) * chosen[:, i : i + 1] for i, expert in enumerate(self.experts)))


class MixtureOfExperts(nn.Module):
    """Experts weighed by what their router makes of a token."""

    def __init__(self, hidden: int, f: FeedForward):
        super().__init__()
        self.f = f
        self.router = nn.Linear(hidden, f.experts, bias=False)
        self.experts = (ListedExperts if f.style == "listed" else StackedExperts)(hidden, f)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        return self.experts(rows, self.choose(self.router(rows))).view(x.shape)

    def choose(self, scores: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        if self.f.router == "sigmoid":
            return scores.sigmoid()
        likely = scores.softmax(-1)
        best, which = likely.topk(2, -1)
        return torch.zeros_like(likely).scatter(-1, which, best)


class Convolution(nn.Module):
    """Convolutional positions: a depthwise convolution over the sequence."""

    def __init__(self, hidden: int):
        super().__init__()
        self.conv = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Residual(nn.Module):
    """`x + part(x)` with norms where the layer has them; several parts run side by side."""

    def __init__(self, hidden: int, layer: Layer):
        super().__init__()
        before, after = layer.place in ("pre", "both"), layer.place in ("post", "both")
        self.place = layer.place
        self.before = NORMS[layer.norm if before else "none"](hidden)
        self.after = NORMS[layer.norm if after else "none"](hidden)

    def forward(self, x: Tensor, *parts: Callable[[Tensor], Tensor]) -> Tensor:
        normed = self.before(x)
        made = sum(part(normed) for part in parts)
        return self.after(x + made) if self.place == "post" else x + self.after(made)


class Block(nn.Module):
    """A layer of the recipe."""

    def __init__(self, hidden: int, layer: Layer, places: Places | None):
        super().__init__()
        self.layer = layer
        self.attention = AttentionLayer(hidden, layer.attention, places)
        self.attention_residual = Residual(hidden, layer)
        self.ffn = (MixtureOfExperts if layer.ffn.experts else Dense)(hidden, layer.ffn)
        if not layer.parallel:
            self.ffn_residual = Residual(hidden, layer)
        if layer.cross is not None:
            self.cross, self.cross_residual = AttentionLayer(hidden, layer.cross, None), Residual(hidden, layer)
        if layer.convolution:
            self.convolution = Convolution(hidden)

    def forward(self, x: Tensor, keep: Tensor | None, context: Tensor | None) -> Tensor:
        if self.layer.convolution:
            x = x + self.convolution(x)
        attention = lambda y: self.attention(y, y, keep)
        if self.layer.parallel:
            return self.attention_residual(x, attention, self.ffn)
        x = self.attention_residual(x, attention)
        if self.layer.cross is not None:
            x = self.cross_residual(x, lambda y: self.cross(y, context, None))
        return self.ffn_residual(x, self.ffn)


class Transformer(nn.Module):
    """The recipe's model."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe, hidden = recipe, recipe.hidden
        self.embed = nn.Embedding(VOCABULARY, hidden)
        if recipe.positions:
            self.positions = nn.Embedding(MOST_PLACES, hidden)
        tables = [a for a in recipe.attentions if a.places == "buckets"]
        table = Places(tables[0]) if recipe.one_table else None
        self.blocks = nn.ModuleList(Block(hidden, layer, _places(layer.attention, table)) for layer in recipe.layers)
        self.norm = NORMS[recipe.layers[0].norm if recipe.final_norm else "none"](hidden)
        if recipe.head == "lm":
            self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        if self.recipe.positions:
            x = x + self.positions(torch.arange(input_ids.size(1)))
        for _ in range(2 if self.recipe.shared else 1):
            for block in self.blocks:
                x = block(x, attention_mask, context)
        x = self.norm(x)
        if self.recipe.head == "tied":
            return F.linear(x, self.embed.weight)
        return self.lm_head(x) if self.recipe.head == "lm" else x


def _places(a: Attention, table: Places | None) -> Places | None:
    return None if a.places == "none" else table if a.places == "buckets" and table is not None else Places(a)


def build(recipe: Recipe, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The recipe's model in float64, with random parameters and buffers, and inputs to capture it with."""
    return randomise(Transformer(recipe), seed).double(), inputs_of(recipe)


def inputs_of(recipe: Recipe, batch: int = 2, sequence: int = 7, places: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the recipe's model; the first row has no padding, and every row keeps its first token."""
    generator = torch.Generator().manual_seed(seed)
    made = {"input_ids": torch.randint(0, VOCABULARY, (batch, sequence), generator=generator)}
    if any(a.padding for a in recipe.attentions):
        lengths = torch.randint(1, sequence + 1, (batch, 1), generator=generator)
        lengths[0] = sequence
        made["attention_mask"] = (torch.arange(sequence)[None] < lengths).long()
    if any(a.cross for a in recipe.attentions):
        made["context"] = torch.randn(batch, places, CONTEXT_WIDTH, generator=generator, dtype=torch.float64)
    return made


def dynamic_sizes(recipe: Recipe) -> dict[str, dict[int, str]]:
    """The names of the dynamic sizes of the model's inputs."""
    return {k: {0: "batch", 1: "places" if k == "context" else "sequence"} for k in inputs_of(recipe)}


# The grammar.

NORM_KINDS = ("layer", "rms", "torch_rms")
# Enough bytes for every choice of three layers; what is left out chooses the first option.
TAPE = 160


class Choices:
    """Choices read off a tape of bytes; the first option of each is the plainest, so that smaller tapes are plainer."""

    def __init__(self, tape: bytes):
        self.tape = iter(tape)

    def below(self, n: int) -> int:
        """One of 0 .. n-1."""
        return next(self.tape, 0) % n

    def of(self, options: Sequence[Any], seldom: Any = None) -> Any:
        """One of the options; the one that is named as seldom is an eighth as likely as another."""
        weighed = [x for x in options for _ in range(1 if x == seldom else 8)] if seldom in options else options
        return weighed[self.below(len(weighed))]

    def yes(self) -> bool:
        """True every other time."""
        return self.below(2) == 1

    def seldom(self) -> bool:
        """True once in eight."""
        return self.below(8) == 7


def choose_attention(choose: Choices, cross: bool = False) -> Attention:
    """One attention; what contradicts an earlier choice is not chosen. einsum takes three times as long to export."""
    layout = choose.of(CROSS_LAYOUTS if cross else LAYOUTS, seldom="einsum")
    queries = 1 if layout in UNGROUPED else choose.of([1, 1, 2, 4])
    groups = choose.of([2, 1, 3, 4] if queries < 4 else [2, 1])
    width = choose.of([4, 2, 6, 8])
    one_width = layout in (*TIED, "chunk")
    core = choose.of(CORES, seldom="einsum")
    return Attention(
        groups,
        queries,
        width,
        width if one_width else choose.of([width, 2, 4, 5, 8]),
        layout,
        core,
        repeat=choose.of([*REPEATS, "stretch"] if groups == 1 and core in STRETCHING else REPEATS),
        causal=not cross and choose.yes(),
        padding=not cross and choose.seldom(),
        rotary="none" if cross else choose.of(["none"] * 4 + ["half", "pairs", "partial"]),
        norm=choose.of(NORM_KINDS) if choose.seldom() else "none",
        places="none" if cross else choose.of(["none"] * 6 + ["alibi", "table", "buckets"]),
        cap=core not in ("sdpa", "sdpa_gqa") and choose.seldom(),
        head_scale=choose.seldom(),
        bias=choose.yes(),
        cross=cross,
    )


def choose_feed_forward(choose: Choices) -> FeedForward:
    """One feed-forward layer, of experts once in eight."""
    experts = choose.of([2, 3]) if choose.seldom() else 0
    return FeedForward(
        choose.of(["plain", "gated", "gate_first", "gate_last"]),
        3 + choose.below(15),
        choose.of(list(ACTIVATIONS)),
        choose.yes(),
        not experts and choose.yes(),
        experts,
        choose.of(EXPERTS, seldom="einsum") if experts else "listed",
        choose.of(ROUTERS) if experts else "topk",
    )


def choose_layer(choose: Choices) -> Layer:
    """One layer."""
    parallel = choose.seldom()
    return Layer(
        choose_attention(choose),
        choose_feed_forward(choose),
        cross=choose_attention(choose, cross=True) if not parallel and choose.seldom() else None,
        place=choose.of(["pre", "post", "both", "none"]),
        norm=choose.of(NORM_KINDS),
        parallel=parallel,
        convolution=choose.seldom(),
    )


def choose_recipe(tape: bytes, most_layers: int = 3) -> Recipe:
    """One model, of one layer mostly."""
    choose = Choices(tape)
    count = min(choose.of([1] * 28 + [2] * 2 + [3]), most_layers)
    layers = tuple(choose_layer(choose) for _ in range(count))
    tables = {(a.groups, a.queries) for a in (layer.attention for layer in layers) if a.places == "buckets"}
    return Recipe(
        choose.of([8, 12, 16, 24]),
        layers,
        head=choose.of(["hidden", "lm", "tied"]),
        positions=choose.yes(),
        final_norm=choose.yes(),
        shared=count == 1 and choose.seldom(),
        one_table=len(tables) == 1 and choose.yes(),
    )


def recipes(most_layers: int = 3) -> st.SearchStrategy[Recipe]:
    """Random recipes. One draw of bytes each: hypothesis would copy parts of a drawn tree into most of its examples."""
    return st.binary(min_size=TAPE, max_size=TAPE).map(lambda tape: choose_recipe(tape, most_layers))
