"""Masks by meaning: those that a meaning is found for, and those that are kept."""

import pytest
import torch
import transformers
from torch import nn

from checks import randomise, tiny_bert
from tilecut_passes.capture import capture
from tilecut_passes.graph import source
from tilecut_passes.recognize_mask import MaskMeaning, recognize_mask

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def meanings(graph):
    nodes = [n for n in graph.nodes if n.target is SDPA]
    assert nodes
    return [
        recognize_mask(graph, n.args[3], source(n), source(n, 1))
        for n in nodes
        if len(n.args) > 3 and n.args[3] is not None
    ]


def test_bert_masks_padding():
    assert meanings(capture(tiny_bert())) == [MaskMeaning("none", "attention_mask")] * 2


def gpt2():
    config = transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    return randomise(transformers.GPT2LMHeadModel(config))


def test_gpt2_masks_padding_and_the_future():
    assert meanings(capture(gpt2())) == [MaskMeaning("top_left", "attention_mask")]


class Attends(nn.Module):
    """q, k, v of 2 heads, and a mask made by `make(mask input, length)`."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(64, 64))

    def forward(self, x, mask):
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return (
            nn.functional.scaled_dot_product_attention(q, k, v, self.make(self, mask, s))
            .transpose(1, 2)
            .reshape(b, s, 8)
        )


def meaning_of(make):
    graph = capture(randomise(Attends(make)), {"x": torch.randn(2, 9, 8), "mask": torch.ones(2, 9, dtype=torch.long)})
    return meanings(graph)[0]


tril = lambda s: torch.ones(s, s, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("make", "meaning"),
    [
        (lambda self, mask, s: (mask != 0)[:, None, None, :], MaskMeaning("none", "mask")),
        (lambda self, mask, s: (mask == 0)[:, None, None, :], MaskMeaning("none", "mask", ("eq", 0))),
        (lambda self, mask, s: (mask == 1)[:, None, None, :], MaskMeaning("none", "mask", ("eq", 1))),
        (lambda self, mask, s: mask[:, None, None, :] > 1, MaskMeaning("none", "mask", ("gt", 1))),
        (lambda self, mask, s: (mask != 3)[:, None, None, :], MaskMeaning("none", "mask", ("ne", 3))),
        (
            lambda self, mask, s: (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min,
            MaskMeaning("none", "mask", ("gt", 0)),
        ),
        (
            lambda self, mask, s: (1.0 - mask[:, None, None, :].float()) * -10000.0,
            MaskMeaning("none", "mask", ("gt", 0)),
        ),
        (lambda self, mask, s: tril(s)[None, None], MaskMeaning("top_left")),
        (lambda self, mask, s: tril(s) & (mask != 0)[:, None, None, :], MaskMeaning("top_left", "mask")),
        (lambda self, mask, s: torch.ones(1, 1, s, s, dtype=torch.bool), MaskMeaning()),
    ],
)
def test_hand_written_masks(make, meaning):
    assert meaning_of(make) == meaning


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda self, mask, s: self.bias[:s, :s][None, None], "depends on the weight bias"),
        (lambda self, mask, s: (mask % 2 == 1)[:, None, None, :], "no product of causal and key padding"),
        (
            lambda self, mask, s: (torch.arange(s) < mask.sum(1, keepdim=True))[:, None, None, :],
            "no product of causal and key padding",
        ),
        (
            lambda self, mask, s: ((torch.arange(s)[:, None] - torch.arange(s)).abs().float() < 300.0)[None, None],
            "no product of causal and key padding",
        ),
        (
            lambda self, mask, s: ((torch.arange(s)[:, None] // 100 - torch.arange(s) // 100).abs() < 4)[None, None],
            "no product of causal and key padding",
        ),
        (lambda self, mask, s: tril(s).triu(-3)[None, None], "no product of causal and key padding"),
        (
            lambda self, mask, s: -0.5 * (torch.arange(s)[:, None] - torch.arange(s)).abs()[None, None].float(),
            "adds a bias to visible scores",
        ),
        (
            lambda self, mask, s: mask[:, None, :, None] == mask[:, None, None, :],
            "no product of causal and key padding",
        ),
    ],
)
def test_masks_without_a_meaning_say_why(make, why):
    assert why in str(meaning_of(make))


def test_a_window_as_long_as_the_traced_text_is_no_causal_mask():
    """A window of 20 looks causal on 9 tokens; probes go beyond every literal."""
    assert "no product" in str(meaning_of(lambda self, mask, s: tril(s).triu(-20)[None, None]))
