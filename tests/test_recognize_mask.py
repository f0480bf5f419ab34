"""Masks by meaning: those that a meaning is found for, and those that are kept."""

import functools

import pytest
import torch
import transformers
from torch import nn

from checks import bert_graph, randomise
from tilecut_passes.capture import capture
from tilecut_passes.graph import source
from tilecut_passes.mask_atoms import Padding, Segments
from tilecut_passes.recognize_mask import MaskMeaning, recognize_mask

SDPA = torch.ops.aten.scaled_dot_product_attention.default
SEEN = Padding("attention_mask")


def meanings(graph):
    nodes = [n for n in graph.nodes if n.target is SDPA]
    assert nodes
    return [
        recognize_mask(graph, n.args[3], source(n), source(n, 1))
        for n in nodes
        if len(n.args) > 3 and n.args[3] is not None
    ]


def test_bert_masks_padding():
    assert meanings(bert_graph()) == [MaskMeaning(paddings=(SEEN,))] * 2


def gpt2():
    config = transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    return randomise(transformers.GPT2LMHeadModel(config))


def test_gpt2_masks_padding_and_the_future():
    assert meanings(capture(gpt2())) == [MaskMeaning("top_left", paddings=(SEEN,))]


class Attends(nn.Module):
    """q, k, v of 2 heads, and for each of `makes` an attention whose mask is `make(self, mask input, length)`."""

    def __init__(self, *makes):
        super().__init__()
        self.makes = makes
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(64, 64))
        self.register_buffer("tril", torch.ones(50, 50, dtype=torch.bool).tril())
        holed = torch.ones(50, 50, dtype=torch.bool).tril()
        holed[47, 5] = False
        self.register_buffer("holed", holed)

    def forward(self, x, mask):
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attend = nn.functional.scaled_dot_product_attention
        return [attend(q, k, v, make(self, mask, s)).transpose(1, 2).reshape(b, s, 8) for make in self.makes]


class Crosses(nn.Module):
    """Queries of one text, keys of another, and masks made by `make(queries, keys)`."""

    def __init__(self, *makes):
        super().__init__()
        self.makes = makes

    def forward(self, x, y):
        q, k = x[:, None], y[:, None]
        attend = nn.functional.scaled_dot_product_attention
        return [attend(q, k, k, make(x.shape[1], y.shape[1]))[:, 0] for make in self.makes]


@functools.cache
def attending(*makes):
    """Captured together: an export for each would take a second."""
    example = {"x": torch.randn(2, 9, 8), "mask": torch.ones(2, 9, dtype=torch.long)}
    return capture(randomise(Attends(*makes)), example)


def meaning_of(make, *others):
    """The meaning of `make`, one of `others` or alone."""
    makes = others or (make,)
    graph = attending(*makes)
    node = [n for n in graph.nodes if n.target is SDPA][makes.index(make)]
    return recognize_mask(graph, node.args[3], source(node), source(node, 1))


@functools.cache
def crossing():
    dims = {"x": {0: "batch", 1: "queries"}, "y": {0: "batch", 1: "keys"}}
    makes = [make for make, _ in CROSSING]
    return meanings(capture(Crosses(*makes), {"x": torch.randn(2, 7, 8), "y": torch.randn(2, 9, 8)}, dims))


tril = lambda s: torch.ones(s, s, dtype=torch.bool).tril()
ramp = torch.arange
LOW = torch.finfo(torch.float32).min


def only(*paddings):
    return MaskMeaning(paddings=paddings)


MEANINGS = [
    (lambda self, mask, s: (mask != 0)[:, None, None, :], only(Padding("mask"))),
    (lambda self, mask, s: (mask == 0)[:, None, None, :], only(Padding("mask", "eq"))),
    (lambda self, mask, s: (mask == 1)[:, None, None, :], only(Padding("mask", "eq", 1))),
    (lambda self, mask, s: mask[:, None, None, :] > 1, only(Padding("mask", "gt", 1))),
    (lambda self, mask, s: (mask != 3)[:, None, None, :], only(Padding("mask", "ne", 3))),
    (lambda self, mask, s: (1.0 - mask[:, None, None, :].float()) * LOW, only(Padding("mask", "gt"))),
    (lambda self, mask, s: (1.0 - mask[:, None, None, :].float()) * -10000.0, only(Padding("mask", "gt"))),
    (
        lambda self, mask, s: torch.where(tril(s), 0.0, LOW) + (1.0 - mask[:, None, None, :].float()) * LOW,
        MaskMeaning("top_left", paddings=(Padding("mask", "gt"),)),
    ),
    (lambda self, mask, s: tril(s)[None, None], MaskMeaning("top_left")),
    (
        lambda self, mask, s: tril(s) & (mask != 0)[:, None, None, :],
        MaskMeaning("top_left", paddings=(Padding("mask"),)),
    ),
    (lambda self, mask, s: torch.ones(1, 1, s, s, dtype=torch.bool), MaskMeaning()),
    (lambda self, mask, s: tril(s).triu(-3)[None, None], MaskMeaning("top_left", (3, -1))),
    (lambda self, mask, s: tril(s).triu(-20)[None, None], MaskMeaning("top_left", (20, -1))),
    (lambda self, mask, s: tril(s).triu(-2000)[None, None], MaskMeaning("top_left", (2000, -1))),
    (lambda self, mask, s: (ramp(s)[:, None] - ramp(s)).abs() < 4, MaskMeaning(window=(3, 3))),
    (lambda self, mask, s: (ramp(s)[:, None] - ramp(s)).abs().float() < 300.0, MaskMeaning(window=(299, 299))),
    (lambda self, mask, s: ramp(s) <= ramp(s)[:, None] + 2, MaskMeaning(window=(-1, 2))),
    (
        lambda self, mask, s: ((ramp(s)[:, None] - ramp(s)).abs() < 4) | (ramp(s) < 2) | (ramp(s) < 2)[:, None],
        MaskMeaning(window=(3, 3), global_tokens=2),
    ),
    (
        lambda self, mask, s: (((ramp(s)[:, None] - ramp(s)) < 4) | (ramp(s) == 0)) & tril(s),
        MaskMeaning("top_left", (3, -1), 1),
    ),
    (lambda self, mask, s: mask[:, None, :, None] == mask[:, None, None, :], MaskMeaning(segments=(Segments("mask", "ids"),))),
    (
        lambda self, mask, s: (mask == 0).cumsum(1)[:, :, None].eq((mask == 0).cumsum(1)[:, None])[:, None] & tril(s),
        MaskMeaning("top_left", segments=(Segments("mask", "restarts"),)),
    ),
    (lambda self, mask, s: (mask != 0)[:, None, :, None], MaskMeaning(queries=(Padding("mask"),))),
    (lambda self, mask, s: (ramp(s)[:, None] // 6 == ramp(s) // 6) & tril(s), MaskMeaning("top_left", chunk=6)),
    (
        lambda self, mask, s: -0.5 * (ramp(s)[:, None] - ramp(s)).abs()[None, None].float(),
        MaskMeaning(slopes=(0.5,)),
    ),
    (
        lambda self, mask, s: torch.where(tril(s), 0.25 * ramp(s).float(), -torch.inf)[None, None],
        MaskMeaning("top_left", slopes=(0.25,)),
    ),
]


@pytest.mark.parametrize(("make", "meaning"), MEANINGS)
def test_hand_written_masks(make, meaning):
    assert meaning_of(make, *(one for one, _ in MEANINGS)) == meaning


def test_a_table_of_positions_is_a_bias_whatever_it_holds_today():
    def make(self, mask, s):
        table = torch.nn.functional.embedding((ramp(s)[:, None] - ramp(s)).clamp(-7, 7) + 7, self.bias[:, :2])
        return table.permute(2, 0, 1)[None] + (1.0 - mask[:, None, None, :].float()) * LOW

    meaning = meaning_of(make)
    assert isinstance(meaning, MaskMeaning)
    assert (meaning.paddings, meaning.ratio) == ((Padding("mask", "gt"),), 1.0) and meaning.bias is not None


CROSSING = [
    (lambda s, t: ramp(t) <= ramp(s)[:, None] + t - s, MaskMeaning("bottom_right")),
    (lambda s, t: ramp(t) <= ramp(s)[:, None], MaskMeaning("top_left")),
    (
        lambda s, t: (ramp(t) <= ramp(s)[:, None] + t - s) & (ramp(t) > ramp(s)[:, None] + t - s - 4),
        MaskMeaning("bottom_right", (3, -1)),
    ),
    (lambda s, t: (ramp(s)[:, None] + t - s - ramp(t)).abs() < 4, MaskMeaning(window=(3, 3))),
    (lambda s, t: (ramp(s)[:, None] - ramp(t)).abs() < 4, MaskMeaning(window=(3, 3), shift="top_left")),
]


@pytest.mark.parametrize("number", range(len(CROSSING)))
def test_the_diagonal_starts_at_either_end(number):
    found, (_, meaning) = crossing()[number], CROSSING[number]
    assert found == meaning
    assert (found.beyond is None) == (meaning.shift == "bottom_right" or meaning.causal != "none")


UNKNOWN = [
    (lambda self, mask, s: mask[:, None, None, :] % 2 == 1, "no product of causal"),
    (lambda self, mask, s: ramp(s) < mask.sum(1)[:, None, None, None], "no product of causal"),
    (
        lambda self, mask, s: ((ramp(s)[:, None] // 100 - ramp(s) // 100).abs() < 4)[None, None],
        "no product of causal",
    ),
    (lambda self, mask, s: tril(s) | (ramp(s) < 4), "no product of causal"),
    (lambda self, mask, s: tril(s) & (ramp(s) != 17), "no product of causal"),
    (lambda self, mask, s: tril(s) & ~((ramp(s) == 3) & (ramp(s)[:, None] == 37)), "no product of causal"),
    (lambda self, mask, s: (ramp(s)[:, None] - ramp(s)).abs() <= s // 2, "no product of causal"),
    (lambda self, mask, s: torch.roll((mask != 0)[:, None, None, :], 1, -1), "no product of causal"),
    (lambda self, mask, s: (mask != 0)[:, None, None, :].flip(0), "no product of causal"),
    (lambda self, mask, s: (mask != 0)[:, None, None, :] | (mask.sum() < 5), "no product of causal"),
    (lambda self, mask, s: (ramp(s) < ramp(s)[:, None])[None, None], "its window ends before the query itself"),
    (lambda self, mask, s: torch.rand(s, s) < 0.5, "it holds the random op"),
    (lambda self, mask, s: tril(s) & (ramp(2)[:, None, None] != 1), "its heads see differently"),
]


# Tables of 50 and 64 positions, which no longer text fits.
BOUNDED = [
    (lambda self, mask, s: self.tril[:s, :s], "causal"),
    (lambda self, mask, s: self.holed[:s, :s], "no product of causal"),
    (lambda self, mask, s: 2 * self.bias[:s, :s][None, None], "everything is seen + bias"),
    (
        lambda self, mask, s: torch.where(tril(s), self.bias[:s, :s], -torch.inf) + self.bias[:s, :s].T,
        "it adds a bias to visible scores that no node",
    ),
    (lambda self, mask, s: self.qkv.weight[0, 0] * (mask.float() @ self.bias[:s, :s])[:, None, None], "activations"),
    (
        lambda self, mask, s: torch.tensor([0.5, -0.5])[:, None, None] * (ramp(s)[:, None] - ramp(s)).abs(),
        "seen + bias",
    ),
    (lambda self, mask, s: -0.01 * ((ramp(s)[:, None] - ramp(s)) ** 2).float(), "everything is seen + bias"),
]


@pytest.mark.parametrize(("make", "text"), BOUNDED)
def test_tables_and_biases(make, text):
    """Among the biases one of two slopes with the wrong sign, and a squared distance: no ALiBi."""
    assert text in str(meaning_of(make, *(one for one, _ in BOUNDED)))


@pytest.mark.parametrize(("make", "why"), UNKNOWN)
def test_masks_without_a_meaning_say_why(make, why):
    assert why in str(meaning_of(make, *(one for one, _ in UNKNOWN)))


@pytest.mark.parametrize(
    "make",
    [
        lambda self, mask, s: (mask % 2 == 1)[:, None, None, :],
        lambda self, mask, s: ~(mask.cumsum(1) > 3)[:, None, None, :],
        lambda self, mask, s: torch.roll(mask != 0, 1, -1)[:, None, None, :],
        lambda self, mask, s: ((mask > 1) & (mask != 4))[:, None, None, :],
    ],
)
def test_any_inner_mask_of_keys_is_a_padding(make):
    meaning = meaning_of(make)
    assert isinstance(meaning, MaskMeaning), meaning
    (padding,) = meaning.paddings
    assert meaning == only(padding)
    assert padding.source in [n.name for n in attending(make).nodes if n.op == "call_function"]


def test_a_mask_of_activations_has_none():
    graph = attending(*(one for one, _ in MEANINGS))
    node = next(n for n in graph.nodes if n.target is SDPA)
    assert "depends on activations" in str(recognize_mask(graph, source(node), source(node), source(node, 1)))
