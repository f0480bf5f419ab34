"""Windows times matrices are the convolution, for every spelling of one."""

import pytest
import torch
from torch import nn

from checks import randomise
from tilecut_passes import convolution_layer as subject
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_passes.convolution_layer import convolution_layer
from tilecut_passes.step_graph import Schedule, Stepper

CASES = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 11)),
    "conv1d same": (nn.Conv1d(4, 6, 4, padding="same"), (3, 4, 11)),
    "conv1d dilated, no bias": (nn.Conv1d(4, 6, 3, dilation=2, padding="valid", bias=False), (3, 4, 11)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 4, 9, 8)),
    "conv2d same": (nn.Conv2d(4, 6, (2, 3), padding="same"), (3, 4, 5, 8)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 5, 5)),
    "depthwise": (nn.Conv1d(5, 5, 3, groups=5), (2, 5, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
    "without a batch": (nn.Conv1d(4, 6, 3), (4, 11)),
}


def run_of(module, x):
    graph = capture(randomise(module), {"input": x}, {})
    node = next(n for n in graph.nodes if convolution_layer(n) is not None)
    run = Stepper(Schedule(graph), Batch({"input": x}))
    run.run_to(node.name, inclusive=True)
    return graph, node, run


@pytest.mark.parametrize("chunk", [64 << 20, 300])
@pytest.mark.parametrize("case", CASES)
def test_rows_times_matrices_are_the_convolution(case, chunk, monkeypatch):
    monkeypatch.setattr(subject, "CHUNK_BYTES", chunk)
    module, shape = CASES[case]
    graph, node, run = run_of(module, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    layer = convolution_layer(node)
    matrices = layer.matrices(graph.tensor(layer.weight).detach())
    outputs = matrices.shape[1]
    bias = graph.tensor(layer.bias).detach() if layer.bias else torch.zeros(len(matrices) * outputs)
    count = 0
    for part, x, y in layer.rows(node, run, run.read(node)):
        want = x @ matrices[part].T + bias[part * outputs : (part + 1) * outputs]
        assert torch.allclose(want, y, atol=1e-4)
        count += y.numel()
    assert count == run.read(node).numel()


def test_padded_positions_do_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 3, padding=1)

        def forward(self, x, attention_mask):
            return self.conv(x) * attention_mask[:, None]

    inputs = {"x": torch.randn(2, 4, 7), "attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4])}
    graph = capture(randomise(Masked()), inputs)
    node = next(n for n in graph.nodes if convolution_layer(n) is not None)
    run = Stepper(Schedule(graph), Batch(inputs))
    run.run_to(node.name, inclusive=True)
    rows = list(convolution_layer(node).rows(node, run, run.read(node)))
    assert sum(len(x) for _, x, _ in rows) == 10
    assert torch.equal(rows[0][2], run.read(node).movedim(1, -1)[inputs["attention_mask"] != 0])


def test_what_is_none_of_it():
    graph = capture(randomise(nn.ConvTranspose1d(4, 6, 3)), torch.randn(2, 4, 7))
    assert all(convolution_layer(n) is None for n in graph.nodes)
