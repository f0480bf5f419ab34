"""Which kernels a graph asks for, and why an attention has none."""

import pytest
import torch
from torch import nn

from checks import randomise, tiny_bert
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.attention import attention
from tilecut_targets.ascend.list_kernels import LONG, SHARE, SHORT, list_kernels
from tilecut_targets.ascend.plan_kernel import Variant


class Attention(nn.Module):
    """Attentions of one projection, each with its options."""

    def __init__(self, *options, heads: int = 2, width: int = 16):
        super().__init__()
        self.options, self.heads, self.width = options, heads, width
        self.qkv = nn.Linear(24, 3 * heads * width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        for given in self.options:
            given = dict(given)
            if given.pop("padded", False):
                given["key_padding"] = mask != 0
            if given.pop("biased", False):
                given["bias"] = torch.ones(1, 1, s, s)
            v = attention(q, k, v, **given)
        return v


def graph_of(*options, **sizes) -> Graph:
    mask = torch.ones(2, 7, dtype=torch.long)
    made = capture(randomise(Attention(*options, **sizes)), {"x": torch.randn(2, 7, 24), "mask": mask})
    run_passes(made, [FuseAttention()])
    return made


def test_attentions_of_one_form_share_a_kernel():
    causal = {"causal": "bottom_right"}
    wanted, refused = list_kernels(graph_of({}, causal, {}, {**causal, "padded": True}))
    assert [one.variant for one in wanted] == [
        Variant(16, 16),
        Variant(16, 16, causal="bottom_right"),
        Variant(16, 16, causal="bottom_right", padding=True),
    ]
    assert [len(one.nodes) for one in wanted] == [2, 1, 1] and refused == []
    assert wanted[0].nq == wanted[0].nk == LONG // SHARE


def test_a_causal_window_looks_left_alone():
    wanted, _ = list_kernels(graph_of({"causal": "bottom_right", "window": (5, 3)}, {"window": (5, 3)}))
    assert [(one.variant.left, one.variant.right) for one in wanted] == [(5, -1), (5, 3)]


def test_bert_needs_one():
    model = tiny_bert(width=16)
    ids = torch.ones(2, 9, dtype=torch.long)
    graph = capture(model, {"input_ids": ids, "attention_mask": ids})
    run_passes(graph, [FuseAttention()])
    (one,), refused = list_kernels(graph)
    assert one.variant == Variant(16, 16, padding=True) and refused == []
    # The table of positions bounds the lengths.
    assert one.nq == one.nk == max(model.config.max_position_embeddings // SHARE, SHORT)


def test_fixed_lengths_that_tiles_divide_have_no_tail():
    mask = torch.ones(2, 128, dtype=torch.long)
    fixed = {"x": {0: "batch"}, "mask": {0: "batch"}}
    for length, tail in ((128, False), (100, True)):
        x = torch.randn(2, length, 24)
        graph = capture(randomise(Attention({})), {"x": x, "mask": mask[:, :length]}, fixed)
        run_passes(graph, [FuseAttention()])
        (one,), _ = list_kernels(graph)
        assert one.variant.tail is tail and one.nq == length


@pytest.mark.parametrize(
    ("options", "sizes", "why"),
    [
        ({"biased": True}, {}, "an additive bias"),
        ({"softcap": 2.0}, {}, "softcap 2.0"),
        ({"global_tokens": 1, "window": (2, 2)}, {}, "global_tokens 1"),
        ({}, {"width": 20}, "head width 20: the kernel takes multiples of 16 up to 256"),
        ({}, {"width": 272}, "head width 272: the kernel takes multiples of 16 up to 256"),
    ],
)
def test_refusals(options, sizes, why):
    wanted, (refused,) = list_kernels(graph_of(options, **sizes))
    assert wanted == [] and refused.why == why and refused.node.startswith("attention")
