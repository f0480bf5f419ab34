"""CANN's rotary embedding: graphs as text in both layouts, what moves through transposes, refusals, numbers."""

import pytest
import torch
from torch import nn

from checks import op_names, randomise
from tilecut_passes.capture import capture
from tilecut_passes.graph import source, value_of
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.rotary import rotary
from tilecut_targets.ascend import npu_norms
from tilecut_targets.ascend.lower_rotary import LowerRotary, fused_rotary


class Turned(nn.Module):
    """x [B, S, 3, D] through the op, in some spelling."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, cos, sin):
        return {"out": self.body(x * self.scale, cos, sin)}


SIZES = {"x": {0: "batch", 1: "sequence"}, "cos": {2: "sequence"}, "sin": {2: "sequence"}}


def captured(body, width=64, rows=1, fixed=False):
    tables = {name: torch.randn(rows, 1, 5, width) for name in ("cos", "sin")}
    sizes = SIZES if rows == 1 else {name: {0: "batch", **dims} for name, dims in SIZES.items()}
    return capture(randomise(Turned(body)), {"x": torch.randn(2, 5, 3, width), **tables}, {} if fixed else sizes)


def flipped(x):
    return x.transpose(1, 2)


HEADS_FIRST = lambda x, c, s: flipped(rotary(flipped(x), c, s))
HEADS_LAST = lambda x, c, s: rotary(x, flipped(c), flipped(s))
UNSEEN = lambda x, c, s: rotary(torch.tanh(flipped(x)), c, s)
PARTIAL = lambda x, c, s: rotary(flipped(x)[..., :64], c[..., :64], s[..., :64])
CAST = lambda x, c, s: rotary(flipped(x).half(), c.half(), s.half())
TWICE = lambda x, c, s: flipped(rotary(flipped(x), c, s) + rotary(flipped(x + 1), c, s))
NEIGHBOURS = lambda x, c, s: rotary(flipped(x), c, s, interleaved=True)


@pytest.mark.parametrize(
    ("body", "width", "after"),
    [
        # The last transpose is the caller's.
        (HEADS_FIRST, 64, "mul transpose transpose {} transpose transpose"),
        (HEADS_LAST, 64, "mul transpose transpose {}"),
        (UNSEEN, 64, "mul transpose tanh transpose transpose transpose {} transpose"),
        (PARTIAL, 128, "mul slice slice slice transpose transpose {} transpose"),
        (CAST, 64, "mul to to to transpose transpose {} transpose"),
        (TWICE, 64, "mul transpose transpose {} transpose add {} transpose add transpose"),
    ],
)
@pytest.mark.parametrize(("container", "op"), [("onnx", npu_norms.rotary), ("air", fused_rotary)])
def test_before_and_after(body, width, after, container, op):
    graph = captured(body, width)
    (record,) = run_passes(graph, [LowerRotary("a2", container)])
    assert op_names(graph) == after.replace("{}", op.__name__) and not graph.refusals
    found = [n for n in graph.nodes if n.target is op]
    assert record.rewrites == len(found) == after.count("{}")
    for node in found:
        x, cos = (value_of(source(node, i)) for i in (0, 1))
        assert (x.shape[2], cos.shape[2]) == (3, 1)
        # A table of every row's own, where the batch is open.
        assert node.args[3:] == ("half", container == "air")
    assert LowerRotary("a2", container)(graph) == 0


@pytest.mark.parametrize("body", [HEADS_FIRST, HEADS_LAST, UNSEEN, PARTIAL, CAST, TWICE, NEIGHBOURS])
@pytest.mark.parametrize("rows", [1, 2])
def test_numbers_in_the_program_of_torch_npu(body, rows):
    graph = captured(body, 128, rows)
    lowered = graph.copy()
    assert run_passes(lowered, [LowerRotary("a950", "air")])[0].rewrites == 1 + (body is TWICE)
    for length in (1, 9):
        inputs = {"x": torch.randn(2, length, 3, 128), **{n: torch.randn(rows, 1, length, 128) for n in ("cos", "sin")}}
        limit = 2e-3 if body is CAST else 1e-6
        assert largest_error(graph.run(inputs), lowered.run(inputs)) < limit


def test_with_one_position_the_heads_are_those_that_share_a_table():
    """A decode step: x [B, 3, 1, D] and cos [1, 1, 1, D]."""
    graph = capture(
        randomise(Turned(HEADS_FIRST)),
        {"x": torch.randn(2, 1, 3, 64), "cos": torch.randn(1, 1, 1, 64), "sin": torch.randn(1, 1, 1, 64)},
        {"x": {0: "batch"}},
    )
    run_passes(graph, [LowerRotary("a2", "onnx")])
    (node,) = [n for n in graph.nodes if n.target is npu_norms.rotary]
    assert list(value_of(source(node)).shape[1:]) == [1, 3, 64]


@pytest.mark.parametrize(
    ("body", "options", "why"),
    [
        (NEIGHBOURS, ("a2", "onnx"), "a batch that is known at run time"),
        (NEIGHBOURS, ("a2", "air"), "takes the modes half; got interleave"),
        (HEADS_FIRST, ("p310", "onnx"), "no fused rotary embedding"),
        (lambda x, c, s: rotary(flipped(x), c.expand(-1, 3, -1, -1), s.expand(-1, 3, -1, -1)), ("a2", "onnx"), "all heads"),
        (lambda x, c, s: rotary(flipped(x), c, s[:, :, :1]), ("a2", "onnx"), "all heads"),
    ],
)
def test_what_is_refused_says_why(body, options, why):
    graph = captured(body)
    before = op_names(graph)
    assert run_passes(graph, [LowerRotary(*options)])[0].rewrites == 0
    assert op_names(graph) == before
    (refusal,) = graph.refusals
    assert why in refusal.why and refusal.by == "LowerRotary"


def test_at_a_fixed_batch_neighbours_are_taken():
    graph = captured(NEIGHBOURS, fixed=True)
    assert run_passes(graph, [LowerRotary("a2", "onnx")])[0].rewrites == 1
    (node,) = [n for n in graph.nodes if n.target is npu_norms.rotary]
    assert node.args[3:] == ("interleave", False)
