"""Attention becomes one op: graphs before and after as text, numbers, refusals, idempotence."""

import pytest
import torch
from torch import nn

from checks import bert_graph, op_names, randomise, text_batch, tiny_bert
from test_recognize_mask import Attends, gpt2, tril
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.run_passes import largest_error, run_passes

OP = torch.ops.tilecut.attention.default


def fused(graph):
    made = graph.copy()
    count = run_passes(made, [FuseAttention()])[0].rewrites
    assert FuseAttention()(made) == 0
    return made, count


def test_bert_becomes_one_op_a_layer_and_its_mask_disappears():
    graph = bert_graph()
    made, count = fused(graph)
    assert count == 2
    before, after = op_names(graph), op_names(made)
    assert "scaled_dot_product_attention" in before and "scaled_dot_product_attention" not in after
    assert "arange" in before and "arange" not in after
    assert after.split().count("attention") == 2 and after.split().count("ne") == 1
    for shape in ((3, 9), (1, 1), (2, 40)):
        assert largest_error(graph.run(text_batch(*shape)), made.run(text_batch(*shape))) < 1e-5
    assert not made.refusals


def test_causal_and_padding_are_options():
    made, _ = fused(capture(gpt2()))
    (node,) = [n for n in made.nodes if n.target is OP]
    assert node.kwargs["causal"] == "top_left"
    assert node.args[3] is not None and node.args[4] is None


@pytest.mark.parametrize(
    "make",
    [
        lambda self, mask, s: tril(s).triu(-3)[None, None],
        lambda self, mask, s: self.bias[:s, :s],
        lambda self, mask, s: (mask % 2 == 1)[:, None, None, :],
    ],
)
def test_another_mask_is_kept_as_a_bias_and_said(make):
    graph = capture(randomise(Attends(make)), {"x": torch.randn(2, 9, 8), "mask": torch.ones(2, 9, dtype=torch.long)})
    made, count = fused(graph)
    assert count == 1
    assert "mask kept as a tensor" in made.refusals[0].why
    inputs = {"x": torch.randn(3, 11, 8), "mask": 2 * torch.ones(3, 11, dtype=torch.long)}
    assert largest_error(graph.run(inputs), made.run(inputs)) < 1e-5


class Flat(nn.Module):
    """Attention of rank 3: heads folded into the batch."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_another_rank_is_left_alone_with_the_reason():
    graph = capture(randomise(Flat()), torch.randn(2, 5, 8))
    made, count = fused(graph)
    assert count == 0
    assert made.refusals[0].why == "q has rank 3, wanted 4"


class Grouped(nn.Module):
    """Four query heads on two KV heads, causal by flag."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x):
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, s, 2, 2, 4).permute(2, 0, 3, 1, 4)
        return (
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
            .transpose(1, 2)
            .reshape(b, s, 16)
        )


def test_grouped_queries_and_the_causal_flag():
    graph = capture(randomise(Grouped()), torch.randn(2, 5, 8))
    made, count = fused(graph)
    assert count == 1
    x = {"x": torch.randn(3, 7, 8)}
    assert largest_error(graph.run(x), made.run(x)) < 1e-5
    (node,) = [n for n in made.nodes if n.target is OP]
    assert node.kwargs["causal"] == "top_left" and node.kwargs["scale"] == 0.3


def test_attention_written_out_is_left_alone_and_said():
    graph = capture(tiny_bert(attn="eager"))
    made, count = fused(graph)
    assert count == 0
    assert len({r.node for r in made.refusals if r.by == "FuseAttention"}) == 2
    assert "written out as matmul, softmax, matmul" in made.refusals[0].why
