"""`tilecut::grouped_matmul` against a loop over experts, its gradients, its ONNX form, and how it is recognised."""

import pytest
import torch
import torch.nn.functional as F

# Importing it registers its op.
import transformers.integrations.moe  # noqa: F401
from torch import Tensor, nn

from checks import op_names, randomise, run_onnx
from tilecut_passes.capture import capture
from tilecut_runtime.errors import InputError
from tilecut_runtime.grouped_matmul import grouped_matmul
from tilecut_targets.write_onnx import write_onnx

ENDS = [[2, 2, 7], [0, 0, 7], [7, 7, 7], [3, 5, 7]]


def by_row(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Every row by its expert's matrix."""
    expert = torch.searchsorted(ends, torch.arange(len(x)), right=True)
    return torch.einsum("ti,tio->to", x, weight[expert])


def operands(ends: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator, dtype=dtype)
    return x, torch.randn(3, 5, 4, generator=generator, dtype=dtype), torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("ends", ENDS)
def test_it_is_a_loop_over_experts(ends):
    x, weight, bounds = operands(ends)
    assert torch.allclose(grouped_matmul(x, weight, bounds), by_row(x, weight, bounds))
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.allclose(grouped_matmul(x, weight, bounds), by_row(x, weight, bounds))


@pytest.mark.parametrize("ends", ENDS)
def test_gradients(ends):
    x, weight, bounds = operands(ends)
    assert torch.autograd.gradcheck(
        lambda a, b: grouped_matmul(a, b, bounds), (x.requires_grad_(), weight.requires_grad_())
    )


def test_the_registration_is_sound():
    torch.library.opcheck(torch.ops.tilecut.grouped_matmul.default, operands([2, 2, 7], torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, e: (x[0], w, e), "x and weight do not fit"),
        (lambda x, w, e: (x[:, :4], w, e), "x and weight do not fit"),
        (lambda x, w, e: (x.float(), w, e), "one floating dtype"),
        (lambda x, w, e: (x, w, e[:2]), r"ends does not fit; got torch.int32 \[2\]; wanted integers \[3\]"),
        (lambda x, w, e: (x, w, e.double()), "ends does not fit"),
        (lambda x, w, e: (x[:6], w, e), "ends does not divide the rows; got .*; wanted rising to 6"),
        (lambda x, w, e: (x, w, e.flip(0)), "ends does not divide the rows"),
    ],
)
def test_bad_operands_are_one_error(change, message):
    with pytest.raises(InputError, match=message):
        grouped_matmul(*change(*operands([2, 2, 7])))


class Experts(nn.Module):
    """Experts as transformers calls them (torch's own op takes float32 only outside of export); counts by histc."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 8))
        self.router = nn.Linear(8, 3)

    def forward(self, x):
        expert, order = torch.sort(self.router(x).argmax(-1))
        counts = torch.histc(expert.float(), bins=3, min=0, max=2)
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = F.relu(torch.ops.transformers.grouped_mm_fallback(x[order], self.up, offs=ends))
        return torch.zeros_like(x).index_copy(
            0, order, torch.ops.transformers.grouped_mm_fallback(rows, self.down, ends)
        )


@pytest.mark.parametrize("rows", [1, 9])
def test_that_of_transformers_is_recognised_and_runs_in_onnx(rows, tmp_path):
    model = randomise(Experts())
    graph = capture(model, torch.randn(6, 8))
    assert op_names(graph).split().count("grouped_matmul") == 2
    assert not {"grouped_mm_fallback", "histc"} & set(op_names(graph).split())
    x = torch.randn(rows, 8)
    assert torch.allclose(graph.run({"x": x})["output"], model(x), atol=1e-5)
    write_onnx(graph, tmp_path / "m.onnx", 20)
    assert torch.allclose(run_onnx(tmp_path / "m.onnx", {"x": x})["output"], model(x).detach(), atol=1e-5)
