"""Norms and rotary embeddings in plain ops: what torch's own ops give, and that targets without them write them out."""

import onnx
import pytest
import torch
from torch import nn

from checks import emit, randomise, run_onnx
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import largest_error
from tilecut_runtime.rotary import rotary
from tilecut_targets.ascend.target import AscendTarget
from tilecut_targets.decompose_norms import decomposed_rms_norm
from tilecut_targets.edge.target import EdgeTarget

aten = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 0.0, 1e-5, 1.0])
@pytest.mark.parametrize("shape", [[8], [5, 8]])
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_a_norm_is_torchs(dtype, eps, shape, size):
    torch.manual_seed(0)
    x, weight = (torch.randn(2, 5, 8) * size).to(dtype), torch.randn(shape).to(dtype)
    for given in (weight, None):
        want, got = aten.rms_norm(x, shape, given, eps), decomposed_rms_norm(x, shape, given, eps)
        torch.testing.assert_close(got, want)


class Turned(nn.Module):
    """A norm of torch's and a rotary embedding that the model calls itself."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 32), nn.RMSNorm(8), nn.Linear(32, 3)

    def forward(self, x):
        b, s, _ = x.shape
        y = self.norm(self.up(x).view(b, s, 4, 8)).transpose(1, 2)
        turn = torch.arange(s, device=x.device)[:, None] / torch.arange(1, 5, device=x.device)
        halves = [torch.cat((t, t), -1)[None, None] for t in (turn.cos(), turn.sin())]
        pairs = [t.repeat_interleave(2, -1)[None, None] for t in (turn.cos(), turn.sin())]
        out = rotary(rotary(y, *halves), *pairs, interleaved=True)
        return self.down(out.transpose(1, 2).reshape(b, s, 32))


@pytest.mark.parametrize("target", [EdgeTarget(), AscendTarget("Ascend310B1")], ids=str)
def test_a_model_that_calls_the_ops_is_written_out(target, tmp_path, monkeypatch):
    monkeypatch.setattr("tilecut_targets.ascend.target.is_installed", lambda name: False)
    graph = capture(randomise(Turned()), torch.randn(2, 5, 6))
    written = emit(target, graph, tmp_path / "artifact")
    path = written.folder / written.written.entry["model"]
    assert {n.domain for n in onnx.load(str(path)).graph.node} <= {"", "com.microsoft"}
    for batch, length in ((1, 1), (3, 8)):
        inputs = {"x": torch.randn(batch, length, 6)}
        assert largest_error(graph.run(inputs), run_onnx(path, inputs)) < 1e-5
