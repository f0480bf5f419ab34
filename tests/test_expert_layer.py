"""Rows times the matrix of their expert are the product, whatever its spelling."""

import pytest
import torch
from torch import nn

from checks import randomise
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_passes.expert_layer import expert_layer
from tilecut_passes.step_graph import Schedule, Stepper


class Sorted(nn.Module):
    """Top-1 experts over rows that are sorted by expert; `transposed` holds them as [E, O, I]."""

    def __init__(self, transposed):
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up = nn.Parameter(torch.empty(3, 8, 6) if transposed else torch.empty(3, 6, 8))
        self.transposed = transposed

    def forward(self, x, attention_mask):
        rows = x.reshape(-1, 6)
        expert, order = self.router(rows).argmax(-1).sort()
        ends = (expert[:, None] <= torch.arange(3)).sum(0).to(torch.int32)
        weight = self.up.transpose(1, 2) if self.transposed else self.up
        return torch.ops.tilecut.grouped_matmul(rows[order], weight, ends), order, attention_mask.sum()


class Dense(nn.Module):
    """Every expert on every row."""

    def __init__(self, op):
        super().__init__()
        self.up = nn.Parameter(torch.empty(3, 6, 8))
        self.op = op

    def forward(self, x, attention_mask):
        rows = x.reshape(-1, 6).expand(3, -1, -1)
        return self.op(rows, self.up), attention_mask.sum()


def run_of(module):
    inputs = {"x": torch.randn(4, 7, 6), "attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4] * 2)}
    graph = capture(randomise(module), inputs)
    node = next(n for n in graph.nodes if expert_layer(n) is not None)
    run = Stepper(Schedule(graph), Batch(inputs))
    run.run_to(node.name, inclusive=True)
    return graph, node, run, inputs


@pytest.mark.parametrize(
    "module",
    [Sorted(False), Sorted(True), Dense(torch.bmm), Dense(torch.matmul)],
    ids=("sorted", "sorted, transposed", "bmm", "matmul"),
)
def test_rows_times_matrices_are_the_product(module):
    graph, node, run, _ = run_of(module)
    layer = expert_layer(node)
    matrices = layer.matrices(graph.tensor(layer.weight).detach())
    assert matrices.shape == (3, 8, 6)
    seen = set()
    for part, x, y in layer.rows(node, run, run.read(node)):
        assert torch.allclose(x @ matrices[part].T, y, atol=1e-5)
        seen |= {part} if len(x) else set()
    assert len(seen) > 1


def test_rows_that_are_padding_are_left_out_although_they_are_sorted():
    _, node, run, inputs = run_of(Sorted(False))
    rows = torch.cat([x for _, x, _ in expert_layer(node).rows(node, run, run.read(node))])
    real = inputs["x"][inputs["attention_mask"] != 0]
    assert len(rows) == len(real)
    assert torch.equal(rows.sort(0).values, real.sort(0).values)


def test_what_is_none_of_it():
    graph = capture(randomise(nn.Bilinear(4, 5, 6)), {"input1": torch.randn(7, 4), "input2": torch.randn(7, 5)})
    assert all(expert_layer(n) is None for n in graph.nodes)
