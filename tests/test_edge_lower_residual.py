"""Residual additions as Sum: graphs as text, what is left alone, and what onnxruntime then does at load."""

import collections

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from checks import op_names, randomise, run_onnx
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.lower_residual import LowerResidual
from tilecut_targets.write_onnx import write_onnx


class Additions(nn.Module):
    """What stands before a layer norm: the first is a residual, in the others something is different."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.row = nn.Parameter(torch.zeros(8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return {
            "residual": self.norm(a + b),
            "with_alpha": self.norm(torch.add(a, b, alpha=2)),
            "with_an_input": self.norm(x + a),
            "with_a_parameter": self.norm(a + self.row),
            "with_a_number": self.norm(a + 1.5),
            "broadcast": self.norm(a + b[:, :1]),
            "subtracted": self.norm(a - b),
            "without_norm": torch.tanh(a + b * 2),
        }


@pytest.fixture(scope="module")
def graph():
    return capture(randomise(Additions()), torch.randn(2, 5, 8))


@pytest.fixture(scope="module")
def lowered(graph):
    made = graph.copy()
    (record,) = run_passes(made, [LowerResidual()])
    assert record.rewrites == 2
    return made


def test_only_an_addition_of_two_activations_of_one_shape_is_rewritten(graph, lowered):
    changed = [
        (str(a.target), b.target) for a, b in zip(graph.nodes, lowered.nodes, strict=True) if a.target != b.target
    ]
    assert changed == [("aten.add.Tensor", ort_ops.residual_sum)] * 2
    norm = lowered.results[lowered.outputs.index("residual")]
    assert norm.args[0].target is ort_ops.residual_sum


def test_a_second_run_rewrites_nothing(lowered):
    assert LowerResidual()(lowered.copy()) == 0


class Shared(nn.Module):
    """One addition that one or two norms read."""

    def __init__(self, norms):
        super().__init__()
        self.a, self.norms = nn.Linear(8, 8), nn.ModuleList([nn.LayerNorm(8) for _ in range(norms)])

    def forward(self, x):
        y = self.a(x) + torch.tanh(x)
        return tuple(norm(y) for norm in self.norms)


def test_an_addition_behind_two_norms_counts_once():
    graph = capture(randomise(Shared(2)), torch.randn(2, 5, 8))
    before = op_names(graph)
    assert run_passes(graph, [LowerResidual()])[0].rewrites == 1
    assert before == "linear tanh add layer_norm layer_norm"
    assert op_names(graph) == "linear tanh residual_sum layer_norm layer_norm"


def test_the_numbers_are_the_same_in_onnxruntime(graph, lowered, tmp_path):
    write_onnx(lowered, tmp_path / "m.onnx", ort_ops.ONNX_OPSET)
    counts = collections.Counter(n.op_type for n in onnx.load(str(tmp_path / "m.onnx")).graph.node)
    assert counts["Sum"] == 2
    x = {"x": torch.randn(3, 4, 8)}
    assert largest_error(graph.run(x), run_onnx(tmp_path / "m.onnx", x)) < 1e-5


def loaded_ops(path):
    """How many nodes of each op are left when a default session has optimised the file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


def test_a_default_session_does_not_fuse_it_into_the_slow_op(tmp_path):
    graph = capture(randomise(Shared(1)), torch.randn(2, 5, 8))
    made = graph.copy()
    run_passes(made, [LowerResidual()])
    write_onnx(made, tmp_path / "sum.onnx", ort_ops.ONNX_OPSET)
    write_onnx(graph, tmp_path / "add.onnx", ort_ops.ONNX_OPSET)
    assert loaded_ops(tmp_path / "sum.onnx")["SkipLayerNormalization"] == 0
    assert loaded_ops(tmp_path / "sum.onnx")["LayerNormalization"] == 1
    assert loaded_ops(tmp_path / "add.onnx")["SkipLayerNormalization"] > 0, "onnxruntime no longer fuses: drop the pass"
