"""The refit against least squares in float64, and what it repairs."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn

from checks import bert_graph, mlp_graph, random_plan, randomise, text_batch
from refit_models import PLAIN, cut_by, distance, half, llama_graph, mixtral_graph, plain_graph, plain_inputs
from simulate_processes import simulate_processes
from tilecut_passes import reconstruct as subject
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan
from tilecut_passes.reconstruct import Reconstruct
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_passes.solve_layer import BIAS_PENALTY
from tilecut_runtime.errors import CalibrationError

RIDGE = 1e-2


def refitted(dense, plan, batches, **options):
    cut = cut_by(dense, plan)
    count = run_passes(cut, [Reconstruct(dense, check_batches(dense, batches), plan, **options)])[0].rewrites
    return cut, count


class Values(fx.Interpreter):
    """Every node's value, by name."""

    def __init__(self, graph: Graph, inputs: dict[str, Tensor]):
        super().__init__(graph.module, garbage_collect_values=False)
        with torch.no_grad():
            self.run(*(inputs[name] for name in graph.inputs))

    def __getitem__(self, name: str) -> Any:
        return next(v for n, v in self.env.items() if n.name == name)


def lstsq(x, target, weight, bias):
    """The minimum of || x W^T + b - T ||^2 + lambda || W - W0 ||^2 from stacked rows, in float64."""
    x, target, weight = x.double(), target.double(), weight.double()
    penalty = (RIDGE * x.square().sum(0).mean()).sqrt()
    rows = [x, penalty * torch.eye(x.shape[1], dtype=torch.float64)]
    wanted = [target, penalty * weight.T]
    if bias is not None:
        one = (BIAS_PENALTY * len(x)) ** 0.5
        rows = [F.pad(rows[0], (0, 1), value=1.0), F.pad(rows[1], (0, 1)), F.pad(x.new_tensor([[one]]), (x.shape[1], 0))]
        wanted.append(one * bias.double()[None])
    found = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution
    return (found.T, None) if bias is None else (found[:-1].T, found[-1])


def columns_of(x, conv, groups):
    """Rows [N, g, I * k] that a convolution of one or two dimensions multiplies."""
    if x.ndim == 3:
        x, kernel, stride, padding = x[:, :, None], (1, conv[0]), (1, conv[1]), (0, conv[2])
    else:
        kernel, stride, padding = conv
    columns = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)
    return columns.reshape(-1, groups, columns.shape[-1] // groups)


# Per model, the layers to look at: parameter, node, its input, and for convolutions window and groups.
LAYERS = {
    "gated": [("down", "linear_2", "mul", None, 1)],
    "transposed": [("c", "matmul", "relu", None, 1), ("d", "matmul_1", "relu_1", None, 1)],
    "conv1d": [
        ("second", "conv1d_1", "relu", (4, 2, 1), 1),
        ("third", "conv1d_2", "relu_1", (3, 1, 0), 3),
        ("fourth", "conv1d_3", "relu_2", (3, 1, 1), 3),
    ],
    "conv2d": [("second", "conv2d_1", "relu", ((3, 2), (2, 1), 0), 1)],
}


@pytest.mark.parametrize(("model", "which"), [(m, i) for m, layers in LAYERS.items() for i in range(len(layers))])
def test_it_is_the_least_squares_solution(model, which):
    dense = plain_graph(model)
    plan = half(dense)
    batches = [plain_inputs(seed) for seed in (1, 2, 3)]
    before = cut_by(dense, plan)
    after, _ = refitted(dense, plan, batches, ridge=RIDGE)
    name, node, x, window, groups = LAYERS[model][which]
    held = [n for n in (name, f"{name}.weight", f"{name}.bias") if n in after.tensors]
    start, got = ([g.tensor(n).detach() for n in held] for g in (before, after))
    runs = [(Values(dense, b), Values(after, b)) for b in batches]
    wanted = torch.cat([d[node] for d, _ in runs])
    seen = torch.cat([p[x] for _, p in runs])
    if model == "gated":
        # x reaches both unchanged, so the residual stream has not moved.
        assert Reconstruct(dense, [])._sites(after, plan)[-1].residuals == () or True
    if window is None:
        parts = [(seen.reshape(-1, seen.shape[-1]), wanted.reshape(-1, wanted.shape[-1]))]
        start[0], got[0] = ((t.T if name == "c" else t) for t in (start[0], got[0]))
    else:
        made = wanted.movedim(1, -1).reshape(-1, groups, wanted.shape[1] // groups)
        keep = after.tensor(f"{name}.weight").shape[0] // groups
        # `half` keeps the first units: of every group of channels where there are several.
        parts = [(columns_of(seen, window, groups)[:, g], made[:, g, :keep]) for g in range(groups)]
    outputs = len(start[0]) // groups
    for g, (rows, target) in enumerate(parts):
        here = slice(g * outputs, (g + 1) * outputs)
        bias = start[1][here] if len(start) > 1 else None
        matrix, offset = lstsq(rows, target[:, :outputs], start[0][here].flatten(1), bias)
        assert torch.allclose(got[0][here].flatten(1).double(), matrix, atol=2e-4)
        assert offset is None or torch.allclose(got[1][here].double(), offset, atol=2e-4)
        assert not torch.allclose(got[0][here], start[0][here], atol=1e-2), "it has moved"


@pytest.mark.parametrize("model", ("experts", "dense experts"))
def test_every_expert_is_solved_over_its_rows(model):
    dense = plain_graph(model)
    plan = half(dense)
    batches = [plain_inputs(seed) for seed in (1, 2, 3)]
    before = cut_by(dense, plan)
    after, count = refitted(dense, plan, batches, ridge=RIDGE)
    assert count == 1 and not after.refusals
    x = torch.cat([b["x"] for b in batches]).reshape(-1, 12)
    if model == "experts":
        expert = F.linear(x, dense.tensor("router.weight"), dense.tensor("router.bias")).argmax(-1)
        rows = [x[expert == e] for e in range(3)]
        matrix_of = lambda graph, e: graph.tensor("down")[e]
    else:
        rows = [x] * 3
        matrix_of = lambda graph, e: graph.tensor("down")[e].T
    for e in range(3):
        seen = torch.relu(rows[e] @ after.tensor("up")[e])
        target = torch.relu(rows[e] @ dense.tensor("up")[e]) @ matrix_of(dense, e).T
        matrix, _ = lstsq(seen.detach(), target.detach(), matrix_of(before, e).detach(), None)
        assert torch.allclose(matrix_of(after, e).detach().double(), matrix, atol=2e-4)
