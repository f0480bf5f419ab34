"""Bias and gelu as one op: graphs as text, what is left alone, and numbers in onnxruntime."""

import collections

import onnx
import pytest
import torch
from torch import nn

from checks import op_names, randomise, run_onnx
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.lower_bias_gelu import LowerBiasGelu
from tilecut_targets.write_onnx import write_onnx


class Feed(nn.Module):
    """linear, gelu, linear"""

    def __init__(self, approximate="none", bias=True, again=False):
        super().__init__()
        self.up, self.down = nn.Linear(8, 21, bias=bias), nn.Linear(21, 8)
        self.gelu, self.again = nn.GELU(approximate), again

    def forward(self, x):
        y = self.up(x)
        z = self.gelu(y)
        return self.down(z + y if self.again else z)


def graph_of(*args, **kwargs):
    return capture(randomise(Feed(*args, **kwargs)), torch.randn(2, 5, 8))


def test_before_and_after():
    graph = graph_of()
    assert op_names(graph) == "linear gelu linear"
    (record,) = run_passes(graph, [LowerBiasGelu()])
    assert record.rewrites == 1
    assert op_names(graph) == "linear bias_gelu linear"
    assert "up.bias" in graph.tensors


def test_a_second_run_rewrites_nothing():
    graph = graph_of()
    run_passes(graph, [LowerBiasGelu()])
    assert LowerBiasGelu()(graph) == 0


@pytest.mark.parametrize(
    "options", [{"approximate": "tanh"}, {"bias": False}, {"again": True}], ids=["tanh", "no bias", "another user"]
)
def test_what_the_op_does_not_mean_is_left_alone(options):
    graph = graph_of(**options)
    before = op_names(graph)
    assert LowerBiasGelu()(graph) == 0
    assert op_names(graph) == before


def test_a_gelu_of_no_linear_layer_is_left_alone():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.gelu(torch.relu(self.up(x))) + nn.functional.gelu(x)

    assert LowerBiasGelu()(capture(randomise(Bare()), torch.randn(2, 8))) == 0


def test_the_numbers_are_the_same_in_onnxruntime(tmp_path):
    graph = graph_of()
    lowered = graph.copy()
    run_passes(lowered, [LowerBiasGelu()])
    write_onnx(lowered, tmp_path / "m.onnx", ort_ops.ONNX_OPSET)
    counts = collections.Counter(n.op_type for n in onnx.load(str(tmp_path / "m.onnx")).graph.node)
    assert (counts["BiasGelu"], counts["Gelu"], counts["Erf"]) == (1, 0, 0)
    for shape in ((1, 1, 8), (3, 7, 8)):
        x = {"x": torch.randn(shape) * 3}
        assert largest_error(graph.run(x), run_onnx(tmp_path / "m.onnx", x)) < 1e-5
