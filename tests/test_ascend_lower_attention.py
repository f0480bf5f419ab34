"""CANN's fused attention: graphs as text, when all nodes carry a mask, refusals, idempotence."""

import pytest
import torch
from torch import nn

from checks import encoder_graph, op_names, randomise
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.attention import attention
from tilecut_targets.ascend import npu_ops
from tilecut_targets.ascend.lower_attention import LowerAttention

OP = torch.ops.tilecut.attention.default


def nodes(graph, op=npu_ops.prompt_flash_attention):
    return [n for n in graph.nodes if n.target is op]


def test_before_and_after():
    graph = encoder_graph().copy()
    run_passes(graph, [FuseAttention()])
    before = op_names(graph)
    assert before.split().count("attention") == 2
    assert run_passes(graph, [LowerAttention()])[0].rewrites == 2
    assert op_names(graph) == before.replace(" attention ", " prompt_flash_attention ")
    assert not graph.refusals


def test_operands_and_options_are_the_attentions():
    fused = encoder_graph().copy()
    run_passes(fused, [FuseAttention()])
    lowered = fused.copy()
    run_passes(lowered, [LowerAttention()])
    for was, now in zip(nodes(fused, OP), nodes(lowered), strict=True):
        assert [n.name for n in now.args] == [n.name for n in was.args[:4]]  # type: ignore[union-attr]
        assert now.kwargs == {"scale": 0.25, "causal": "none", "always_mask": True}
        assert now.meta["val"].shape == was.meta["val"].shape and now.meta["val"].dtype == torch.float32


def test_a_second_run_rewrites_nothing():
    graph = encoder_graph().copy()
    run_passes(graph, [FuseAttention(), LowerAttention()])
    names = op_names(graph)
    assert LowerAttention()(graph) == 0
    assert op_names(graph) == names


class Attends(nn.Module):
    """Attention of x [B, 4, S, 16] with itself, in the spellings that it is given."""

    def __init__(self, *spellings):
        super().__init__()
        self.spellings = spellings
        self.slopes = nn.Parameter(torch.zeros(4))
        self.weight = nn.Parameter(torch.zeros(16, 24))

    def forward(self, x, keep):
        return {f"out_{i}": make(self, x, keep) for i, make in enumerate(self.spellings)}


def captured(*spellings):
    sizes = {"x": {0: "batch", 2: "sequence"}, "keep": {0: "batch", 1: "sequence"}}
    example = {"x": torch.randn(2, 4, 5, 16), "keep": torch.ones(2, 5, dtype=torch.bool)}
    return capture(randomise(Attends(*spellings)), example, sizes)


PLAIN = lambda m, x, keep: attention(x, x, x)
PADDED = lambda m, x, keep: attention(x, x, x, keep)
CAUSAL = lambda m, x, keep: attention(x, x, x, causal="bottom_right")
BIASED = lambda m, x, keep: attention(x, x, x, keep, x[:, :1] @ x[:, :1].transpose(-1, -2))


@pytest.mark.parametrize(
    ("spellings", "masked"),
    [
        ([PLAIN], False),
        ([PLAIN, PLAIN], False),
        ([PLAIN, PADDED], True),
        ([CAUSAL, PLAIN], True),
        ([PLAIN, BIASED], False),
    ],
)
def test_all_nodes_of_a_model_carry_a_mask_or_none_does(spellings, masked):
    graph = captured(*spellings)
    run_passes(graph, [LowerAttention()])
    assert [n.kwargs["always_mask"] for n in nodes(graph)] == [masked] * len([s for s in spellings if s is not BIASED])


def test_grouped_queries_are_lowered():
    graph = captured(lambda m, x, keep: attention(x, x[:, :2], x[:, 2:], keep, causal="top_left"))
    assert run_passes(graph, [LowerAttention()])[0].rewrites == 1
    (node,) = nodes(graph)
    assert node.kwargs["causal"] == "top_left"


ADDITIVE = "bias, ALiBi, soft-cap, window or global tokens"
WIDE = lambda n: lambda m, x, keep: (lambda y: attention(y, y, y))(torch.cat([x] * n, -1))


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (BIASED, ADDITIVE),
        (lambda m, x, keep: attention(x, x, x, None, None, m.slopes), ADDITIVE),
        (lambda m, x, keep: attention(x, x, x, softcap=2.0), ADDITIVE),
        (lambda m, x, keep: attention(x, x, x, window=(3, -1)), ADDITIVE),
        (lambda m, x, keep: attention(x, x, x, global_tokens=2), ADDITIVE),
        (lambda m, x, keep: attention(x, x, x, dropout_p=0.1), "dropout"),
        (lambda m, x, keep: attention(x, x, x @ m.weight), "queries are 16 wide and values 24"),
        (lambda m, x, keep: PLAIN(m, x[..., :8], keep), "head width 8, wanted a multiple of 16 up to 512"),
        (lambda m, x, keep: PLAIN(m, x @ m.weight, keep), "head width 24, wanted a multiple of 16 up to 512"),
        (WIDE(33), "head width 528, wanted a multiple of 16 up to 512"),
    ],
)
def test_what_the_op_cannot_express_is_left_alone_with_the_reason(spelling, reason):
    graph = captured(spelling)
    before = op_names(graph)
    assert run_passes(graph, [LowerAttention()])[0].rewrites == 0
    assert op_names(graph) == before
    (refusal,) = graph.refusals
    assert (refusal.by, refusal.why) == ("LowerAttention", reason)
    assert [refusal.node] == [n.name for n in nodes(graph, OP)]


def test_the_widest_head_is_lowered():
    graph = captured(WIDE(32))
    assert run_passes(graph, [LowerAttention()])[0].rewrites == 1
