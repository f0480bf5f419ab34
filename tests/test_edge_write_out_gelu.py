"""The tanh form of gelu in simpler ops, and ExecuTorch's numbers with it."""

import torch
import torch.nn.functional as F
from torch import nn

from checks import emit, op_names
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import run_passes
from tilecut_targets.edge.executorch_program import ExecuTorchTarget
from tilecut_targets.edge.write_out_gelu import WriteOutGelu


class Both(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh"), F.gelu(x)


def test_the_tanh_form_is_written_out_and_the_exact_one_left_alone():
    graph = capture(Both(), {"x": torch.randn(3, 8)})
    lowered = graph.copy()
    assert run_passes(lowered, [WriteOutGelu()])[0].rewrites == 1
    assert op_names(lowered).split() == ["tanh_gelu", "gelu"]
    assert WriteOutGelu()(lowered) == 0
    x = {"x": torch.linspace(-6, 6, 64).reshape(8, 8)}
    for got, want in zip(lowered.run(x).values(), graph.run(x).values(), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_executorch_tells_the_two_apart(tmp_path):
    graph, target = capture(Both(), {"x": torch.randn(3, 8)}), ExecuTorchTarget()
    made = emit(target, graph, tmp_path / "a")
    x = torch.linspace(-4, 4, 32).reshape(4, 8)
    one, two = target.open_model(made.folder / "model.pte", 1)({"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(one), F.gelu(x, approximate="tanh"), atol=1e-6)
    assert torch.allclose(torch.from_numpy(two), F.gelu(x), atol=1e-6)
    assert abs(one - two).max() > 1e-4
