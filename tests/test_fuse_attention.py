"""Attention becomes one op: every spelling with the meaning of its mask, numbers, refusals, idempotence."""

import functools

import pytest
import torch
from torch import nn

from attention_models import SPELLINGS, described, embedded, fused_nodes, hand, padded, score_sized, scores
from checks import bert_graph, op_names, randomise, text_batch
from test_recognize_mask import Attends, gpt2, tril
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph, arguments, is_call, sizes_of, value_of
from tilecut_passes.run_passes import largest_error, run_passes

OP = torch.ops.tilecut.attention.default
SLOW = [name for name, one in SPELLINGS.items() if one.slow]
PADDINGS = {
    "whole": lambda b, s: torch.ones(b, s),
    "right": lambda b, s: (torch.arange(s) < torch.tensor([[s], [s // 2], [1]])[:b]).float(),
    "left": lambda b, s: (torch.arange(s) >= torch.tensor([[0], [s // 2], [s - 1]])[:b]).float(),
    "holes": lambda b, s: ((torch.arange(s) * 7 + torch.arange(b)[:, None]) % 3 > 0).float(),
}


def built(build):
    made = build()
    model, example = made if isinstance(made, tuple) else (made, None)
    return capture(randomise(model), example)


def fused(graph):
    made = graph.copy()
    count = run_passes(made, [FuseAttention()])[0].rewrites
    assert FuseAttention()(made) == 0
    return made, count


@functools.lru_cache(maxsize=8)
def spelled(name: str) -> tuple[Graph, Graph, int]:
    graph = built(SPELLINGS[name].build)
    return graph, *fused(graph)


def inputs_for(graph: Graph, batch: int, length: int, padding: str) -> dict[str, torch.Tensor]:
    """Inputs of a graph; the texts of a decoder are longer by 2, sizes that are fixed stay."""
    generator = torch.Generator().manual_seed(length)
    sizes = {"batch": batch, "sequence": length, "decoder_sequence": length + 2}
    made = {}
    for name, node in zip(graph.inputs, graph.placeholders, strict=True):
        value = value_of(node)
        shape = [s if isinstance(s, int) else sizes[graph.dims[s]] for s in sizes_of(value)]
        if name == "attention_mask":
            made[name] = PADDINGS[padding](*shape).to(value.dtype)
        elif name == "position_ids":
            made[name] = (torch.arange(shape[1]) % 4)[None].repeat(shape[0], 1)
        elif value.is_floating_point():
            made[name] = torch.randn(shape, generator=generator).to(value.dtype)
        else:
            made[name] = torch.randint(0, 2 if name == "token_type_ids" else 99, shape, generator=generator)
    return made


def real_rows(outputs: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs at the positions of real tokens, each of which sees at least itself."""
    mask = given.get("attention_mask")
    return {
        name: x[mask != 0] if mask is not None and x.shape[:2] == mask.shape else x
        for name, x in outputs.items()
        # A pooled first token may be padding.
        if mask is None or x.shape[:2] == mask.shape or (x.ndim == 3 and bool(mask.any(1).all()))
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SPELLINGS]
)
def test_every_spelling_becomes_the_op_with_the_meaning_of_its_mask(name):
    graph, made, count = spelled(name)
    wanted = SPELLINGS[name].becomes
    assert (count, tuple(described(n) for n in fused_nodes(made))) == (len(wanted), wanted)
    assert "softmax" not in op_names(made) and "scaled_dot_product_attention" not in op_names(made)
    assert score_sized(made) == []
    # 11 was traced.
    for batch, length in ((3, 19), (1, 5)):
        for padding in PADDINGS if "attention_mask" in graph.inputs else ("whole",):
            given = inputs_for(graph, batch, length, padding)
            want, got = (real_rows(g.run(given), given) for g in (graph, made))
            assert want and largest_error(want, got) < 2e-5, (length, padding)


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


def test_eager_attention_is_one_line_of_ops():
    _, made, _ = spelled("scale_on_both")
    projected = "linear reshape transpose " * 3
    assert op_names(made) == f"gt sym_size sym_size {projected}attention transpose reshape linear"


def test_causal_and_padding_are_options():
    made, _ = fused(capture(gpt2()))
    (node,) = [n for n in made.nodes if n.target is OP]
    assert node.kwargs["causal"] == "top_left"
    assert node.args[3] is not None and node.args[4] is None


class Lengths(nn.Module):
    """Attention over rows of which the first `lengths` [B] are real, in four spellings."""

    def __init__(self, spell):
        super().__init__()
        self.spell = spell

    def forward(self, x, lengths):
        keep = torch.arange(x.shape[2])[None] < lengths[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=self.spell(keep[:, None, None]))


@pytest.mark.parametrize(
    ("spell", "causal"),
    [
        (lambda m: m, False),
        (lambda m: m & torch.ones(m.shape[-1], m.shape[-1], dtype=torch.bool).tril(), True),
        (lambda m: torch.zeros(m.shape).masked_fill(~m, -1e9), False),
        (lambda m: torch.where(m & torch.ones(m.shape[-1], m.shape[-1], dtype=torch.bool).tril(), 0.0, -1e9), True),
    ],
)
def test_padding_by_lengths_is_padding(spell, causal):
    example = {"x": torch.randn(3, 2, 9, 16), "lengths": torch.tensor([9, 4, 1])}
    dense = capture(Lengths(spell), example, {"x": {0: "batch", 2: "sequence"}, "lengths": {0: "batch"}})
    graph = dense.copy()
    run_passes(graph, [FuseAttention()])
    (node,) = [n for n in graph.nodes if is_call(n, OP)]
    padding = arguments(node)["key_padding"]
    assert is_call(padding, torch.ops.aten.lt.Tensor) and arguments(node)["bias"] is None and not graph.refusals
    assert (arguments(node)["causal"] != "none") == causal
    for s, lengths in ((9, [9, 4, 1]), (5, [1, 5, 3]), (12, [12, 12, 2])):
        given = {"x": torch.randn(3, 2, s, 16), "lengths": torch.tensor(lengths)}
        assert largest_error(graph.run(given), dense.run(given)) < 1e-6


def test_layers_share_one_padding():
    made, _ = fused(bert_graph())
    first, second = fused_nodes(made)
    assert first.args[3] is second.args[3]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda self, mask, s: mask[:, None, None, :] % 2 == 1, "no product of causal"),
        (lambda self, mask, s: (mask != 0)[:, None, :, None], "query padding mask != 0"),
        (lambda self, mask, s: mask[:, None, :, None] == mask[:, None, None, :], "packed segments of mask"),
        (
            lambda self, mask, s: tril(s) & (mask[:, None, :, None] == mask[:, None, None, :]),
            "packed segments of mask x causal",
        ),
        (
            lambda self, mask, s: (torch.arange(s)[:, None] // 4 == torch.arange(s) // 4)[None, None],
            "chunks of 4",
        ),
    ],
)
def test_another_mask_is_kept_as_a_bias_and_said(make, why):
    graph = capture(randomise(Attends(make)), {"x": torch.randn(2, 9, 8), "mask": torch.ones(2, 9, dtype=torch.long)})
    made, count = fused(graph)
    assert count == 1
    assert made.refusals[0].why.startswith(f"mask kept as a tensor: {why}")
    (node,) = fused_nodes(made)
    assert node.args[3] is None and node.args[4] is not None and node.kwargs["causal"] == "none"
    odd = (2 * torch.arange(11) + 1)[None] // torch.tensor([[1], [3], [9]])
    inputs = {"x": torch.randn(3, 11, 8), "mask": odd + 1 - odd % 2}
    assert largest_error(graph.run(inputs), made.run(inputs)) < 1e-5


class Flat(nn.Module):
    """Attention of rank 3: one head."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Folded(nn.Module):
    """Attention of rank 3: heads folded into the batch, and a mask for each."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x, mask):
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 2, 4).transpose(1, 2).reshape(2 * b, s, 4) for t in self.qkv(x).chunk(3, -1))
        seen = (mask != 0)[:, None].expand(b, 2, s).reshape(2 * b, 1, s)
        out = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        return out.view(b, 2, s, 4).transpose(1, 2).reshape(b, s, 8)


def test_rank_3_is_one_head_or_heads_in_the_batch():
    graph = capture(randomise(Flat()), torch.randn(2, 5, 8))
    made, count = fused(graph)
    assert (count, described(fused_nodes(made)[0])) == (1, "causal")
    x = {"x": torch.randn(3, 7, 8)}
    assert largest_error(graph.run(x), made.run(x)) < 1e-5
    graph = capture(randomise(Folded()), {"x": torch.randn(2, 5, 8), "mask": torch.ones(2, 5, dtype=torch.int64)})
    made, count = fused(graph)
    assert (count, described(fused_nodes(made)[0])) == (1, "padding")
    given = {"x": torch.randn(3, 7, 8), "mask": PADDINGS["holes"](3, 7).long()}
    assert largest_error(graph.run(given), made.run(given)) < 1e-5


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


def test_factors_join_the_scale():
    for name, scale in (("scale_on_query", 0.3), ("scale_on_key", 1 / 3), ("scale_on_both", 8**-0.5)):
        _, made, _ = spelled(name)
        (node,) = fused_nodes(made)
        assert node.kwargs["scale"] == pytest.approx(scale, rel=1e-12), name
        assert "mul" not in op_names(made) and "div" not in op_names(made), name


def twice(q, k, v, mask):
    weights = (scores(q, k) + padded(mask)).softmax(-1)
    return weights @ v + 0.1 * weights.sum(-1, keepdim=True)


def dropped(q, k, v, mask):
    return torch.dropout((scores(q, k) + padded(mask)).softmax(-1), 0.1, True) @ v


def soft_mask(q, k, v, mask):
    return scores(q, k).masked_fill((mask == 0)[:, None, None], -5.0).softmax(-1) @ v


def divided_after(q, k, v, mask):
    return (scores(q, k).masked_fill((mask == 0)[:, None, None], -1e4) / 8).softmax(-1) @ v


def capped_mask(q, k, v, mask):
    return (5 * torch.tanh((scores(q, k) + padded(mask)) / 5)).softmax(-1) @ v


def squared(q, k, v, mask):
    return (scores(q, k) ** 2).softmax(-1) @ v


def over_queries(q, k, v, mask):
    return scores(q, k).softmax(-2) @ v


def by_activation(q, k, v, mask):
    return (scores(q, k) / v.sum(-1, keepdim=True)).softmax(-1) @ v


def over_pairs(q, k, v, mask):
    b, h, s, _ = q.shape
    return scores(q, k).reshape(b, h, s * s).softmax(-1).reshape(b, h, s, s) @ v


def with_windows(q, k, v, mask):
    b, h, s, _ = q.shape
    shifted = scores(q, k).reshape(b, 1, h, s, s) + padded(mask)[:, None]
    return shifted.softmax(-1).reshape(b, h, s, s) @ v


def two_products(q, k, v, mask):
    return (scores(q, k) + scores(k, q)).softmax(-1) @ v


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (twice, "its attention weights are read by other calls too (aten.sum.dim_IntList)"),
        (dropped, "it has dropout 0.1"),
        (soft_mask, "aten.masked_fill.Scalar sets scores to -5, which does not hide them"),
        (divided_after, "aten.masked_fill.Scalar sets scores to -1250, which does not hide them"),
        (capped_mask, "aten.add.Tensor comes before the soft-cap"),
        (squared, "its scores come from aten.pow.Tensor_Scalar, not from a matmul of queries and keys"),
        (over_queries, "its softmax does not run over the keys"),
        (by_activation, "its scores are multiplied by aten.div.Tensor with no constant"),
        (over_pairs, "its attention weights pass aten.reshape.default"),
        (with_windows, "its mask has more than 4 dimensions"),
        (two_products, "its scores are made of two matmuls"),
    ],
)
def test_what_is_no_such_attention_is_left_alone_with_the_reason(attend, why):
    graph = built(hand(attend))
    before = op_names(graph)
    made, count = fused(graph)
    assert count == 0 and op_names(made) == before
    assert {r.why for r in made.refusals} == {why}


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        mixed, weights = self.attention(x, x, x, need_weights=True, average_attn_weights=False)
        return {"mixed": mixed, "weights": weights}


def test_weights_that_are_an_output_are_left_alone():
    graph = capture(randomise(Returned()), {"x": embedded()["x"]})
    made, count = fused(graph)
    assert count == 0
    assert "attention weights are" in made.refusals[0].why


def test_a_softmax_that_weighs_no_values_is_no_attention():
    made, count = fused(capture(randomise(nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1))), torch.randn(2, 8)))
    assert count == 0 and not made.refusals
