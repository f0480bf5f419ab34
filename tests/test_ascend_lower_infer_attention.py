"""Attention as torch_npu's fused op: arguments by the legality table, layouts, masks made once, refusals, numbers."""

from typing import Any

import pytest
import torch
from torch import nn

from checks import encoder_graph, op_names, randomise
from test_ascend_lower_attention import BIASED, CAUSAL, FREE, HIDDEN, PADDED, PLAIN, WINDOW, captured
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.attention import attention
from tilecut_runtime.npu_attention import ALL_TOKENS, TRIANGLE
from tilecut_targets.ascend import npu_ops
from tilecut_targets.ascend.lower_infer_attention import LowerInferAttention, fused_infer_attention, triangle

# fp16 inside.
LIMIT = 2e-3
CROSS = lambda m, x, keep: attention(x[:, :, :3], x, x, keep)
BEHIND = lambda m, x, keep: attention(x[:, :, :3], x, x, causal="bottom_right")
AHEAD = lambda m, x, keep: attention(x[:, :, :3], x, x, causal="top_left")
BAND = lambda m, x, keep: attention(x, x, x, window=(3, 2))
GROUPED = lambda m, x, keep: attention(x, x[:, :2], x[:, 2:], keep, causal="top_left")
GLOBAL = lambda m, x, keep: attention(x, x, x, keep, window=(2, 2), global_tokens=1)
SPELLINGS = [PLAIN, PADDED, CAUSAL, WINDOW, BAND, CROSS, BEHIND, AHEAD, GROUPED, GLOBAL, HIDDEN]


def nodes(graph, op: Any = fused_infer_attention) -> list[Any]:
    return [n for n in graph.nodes if n.target is op]


def padded(side, batch=3, length=9):
    """x and keep, rows of different lengths, padded on one side."""
    lengths = torch.tensor([length, 4, 1])[:, None]
    place = torch.arange(length)[None]
    keep = place < lengths if side == "right" else place >= length - lengths
    return {"x": torch.randn(batch, 4, length, 16, generator=torch.Generator().manual_seed(7)), "keep": keep}


def test_before_and_after():
    graph = encoder_graph().copy()
    run_passes(graph, [FuseAttention()])
    assert run_passes(graph, [LowerInferAttention()])[0].rewrites == 2
    after = op_names(graph)
    assert after.split().count("fused_infer_attention") == 2 and after.split().count("hidden_pairs") == 1
    # Of eight transposes two are left, whose sizes the mask is made of; the exported program has none.
    assert after.split().count("transpose") == 2
    assert not graph.refusals
    assert LowerInferAttention()(graph) == 0


@pytest.mark.parametrize(
    ("spelling", "mode", "tokens", "mask"),
    [
        (PLAIN, 0, FREE, None),
        (PADDED, 0, FREE, "full"),
        (CROSS, 0, FREE, "full"),
        (CAUSAL, 3, (ALL_TOKENS, 0), "compressed"),
        (BEHIND, 3, (ALL_TOKENS, 0), "compressed"),
        (AHEAD, 2, (ALL_TOKENS, 0), "compressed"),
        (WINDOW, 4, (3, 0), "compressed"),
        (BAND, 4, (3, 2), "compressed"),
        (GROUPED, 0, (ALL_TOKENS, 0), "full"),
        (GLOBAL, 0, FREE, "full"),
        (HIDDEN, 0, FREE, "full"),
    ],
)
def test_the_arguments_are_the_tables(spelling, mode, tokens, mask):
    graph = captured(spelling)
    run_passes(graph, [LowerInferAttention()])
    (node,) = nodes(graph)
    q, k, _, drop, options = node.args
    assert (options["sparse_mode"], (options["pre_tokens"], options["next_tokens"])) == (mode, tokens)
    assert options["num_heads"] == q.meta["val"].shape[1] and options["num_key_value_heads"] == k.meta["val"].shape[1]
    assert options["scale"] == 0.25 and options["input_layout"] == "BNSD"
    assert (drop and drop.target) is {None: None, "full": npu_ops.hidden_pairs, "compressed": triangle}[mask]
    if mask == "compressed":
        assert list(drop.meta["val"].shape) == [TRIANGLE, TRIANGLE]


def test_masks_are_made_once_each():
    graph = captured(CAUSAL, PADDED, WINDOW, PADDED, CAUSAL)
    run_passes(graph, [LowerInferAttention()])
    causal, padding, window, again, once_more = (n.args[3] for n in nodes(graph))
    assert causal is window is once_more and padding is again


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=range(len(SPELLINGS)))
def test_numbers_are_the_attentions(spelling, side):
    graph = captured(spelling)
    inputs = padded(side)
    want = graph.run(inputs)
    assert run_passes(graph, [LowerInferAttention()])[0].rewrites == 1
    assert largest_error(want, graph.run(inputs)) <= LIMIT


class Packed(nn.Module):
    """Heads in a layout [B, S, N, D], of any number and width."""

    def __init__(self, heads, kv_heads, width):
        super().__init__()
        self.sizes = heads, kv_heads, width
        self.q, self.kv = nn.Linear(24, heads * width), nn.Linear(24, kv_heads * width)

    def forward(self, x):
        heads, kv_heads, width = self.sizes
        q = self.q(x).view(*x.shape[:2], heads, width).transpose(1, 2)
        k = self.kv(x).view(*x.shape[:2], kv_heads, width).transpose(1, 2)
        return attention(q, k, k, scale=0.2).transpose(1, 2).flatten(2)


def test_a_layout_beyond_its_limit_stays_transposed():
    graph = capture(randomise(Packed(256, 256, 256)), torch.randn(2, 5, 24))
    run_passes(graph, [LowerInferAttention()])
    (node,) = nodes(graph)
    assert node.args[4]["input_layout"] == "BNSD"


@pytest.mark.parametrize(
    ("model", "limit", "got"),
    [
        (Packed(4, 4, 20), "head widths in multiples of 16 up to 512", "got 20; the nearest is 32"),
        (Packed(100, 1, 16), "up to 64 heads for one KV head", "got 100 heads on 1, 100; the nearest is 2 KV heads"),
        (Packed(257, 257, 16), "up to 256 heads", "got 257"),
    ],
)
def test_what_the_op_does_not_take_is_left_alone_with_the_reason(model, limit, got):
    graph = capture(randomise(model), torch.randn(2, 5, 24))
    before = op_names(graph)
    assert run_passes(graph, [LowerInferAttention()])[0].rewrites == 0
    assert op_names(graph) == before
    (refusal,) = graph.refusals
    assert refusal.by == "LowerInferAttention" and limit in refusal.why and got in refusal.why


def test_a_bias_is_left_alone():
    graph = captured(BIASED)
    assert run_passes(graph, [LowerInferAttention()])[0].rewrites == 0
    assert "adds nothing to its scores; got an additive bias" in graph.refusals[0].why
