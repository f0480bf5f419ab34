"""RMS norms as onnxruntime knows them: graphs as text, what is left alone, and what it makes of the file."""

import collections

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from checks import op_names, randomise, run_onnx
from tilecut_passes.capture import capture
from tilecut_passes.graph import arguments
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.edge.forms import Forms, write_forms
from tilecut_targets.edge.lower_rms_norm import LowerRmsNorm


class Norms(nn.Module):
    """Norms of several kinds, one behind the other."""

    def __init__(self):
        super().__init__()
        self.given, self.default = nn.RMSNorm(8, eps=1e-3), nn.RMSNorm(8)
        self.bare, self.plane = nn.RMSNorm(8, eps=1e-6, elementwise_affine=False), nn.RMSNorm([5, 8], eps=1e-6)

    def forward(self, x):
        return self.plane(self.bare(self.default(self.given(x))))


@pytest.fixture(scope="module")
def norms():
    return capture(randomise(Norms()), torch.randn(2, 5, 8), {"x": {0: "batch"}})


@pytest.fixture(scope="module")
def lowered(norms):
    made = norms.copy()
    (record,) = run_passes(made, [LowerRmsNorm()])
    assert record.rewrites == 2
    return made


def test_before_and_after(norms, lowered):
    assert op_names(norms) == "rms_norm rms_norm rms_norm rms_norm"
    calls = [n for n in lowered.nodes if n.op == "call_function"]
    assert [n.target.__module__.endswith("edge.lower_rms_norm") for n in calls if callable(n.target)] == [1, 1, 0, 0]
    assert [arguments(n)["eps"] for n in calls[2:]] == [1e-6, 1e-6] and calls[0].args[2] == 1e-3
    assert calls[1].args[2] == torch.finfo(torch.float32).eps
    assert LowerRmsNorm()(lowered) == 0


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_numbers_are_the_norms(norms, lowered, scale):
    x = {"x": torch.randn(3, 5, 8) * scale}
    assert largest_error(lowered.run(x), norms.run(x)) < 1e-6


def test_another_type_is_left_alone():
    graph = capture(nn.RMSNorm(8).to(torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16))
    assert LowerRmsNorm()(graph.copy()) == 0


def test_onnxruntime_makes_one_kernel_of_it_and_not_of_the_exporters_spelling(norms, tmp_path):
    kernels = {}
    for form in ("SimplifiedLayerNormalization", "simpler ops"):
        forms, made = Forms(norm=form), norms.copy()
        run_passes(made, forms.passes)
        write_forms(made, tmp_path / "m.onnx", forms)
        x = {"x": torch.randn(3, 5, 8)}
        assert largest_error(run_onnx(tmp_path / "m.onnx", x), norms.run(x)) < 1e-5
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
        held = onnx.load(str(tmp_path / "optimized.onnx")).graph.node
        kernels[form] = collections.Counter(n.op_type for n in held)["SimplifiedLayerNormalization"]
    assert kernels == {"SimplifiedLayerNormalization": 2, "simpler ops": 0}
