"""Ranges of activations: padding does not count, outliers are weighed by their error, odd tensors get a range or none."""

import numpy as np
import torch
from torch import nn

from checks import randomise
from test_edge_quantize_onnx import write
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_targets.edge.activation_ranges import Range, _best, measure_ranges


def error_of(counts, middle, scale, zero):
    made = Range(scale, zero, np.empty((0, 1)))
    return float((counts * np.square(made.rounded(middle) - middle)).sum())


def test_no_range_of_a_fine_grid_is_much_closer():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(200_000), [40.0, 41.0, -3.0]])
    low, high = float(x.min()), float(x.max())
    counts = np.histogram(x, 4096, (low, high))[0]
    middle = low + (high - low) / 4096 * (np.arange(4096) + 0.5)
    found = error_of(counts, middle, *_best(counts, low, high))
    # Two outliers in 200,000 are clipped: their error is less than what coarse steps cost.
    whole = (high - low) / 255
    assert found < 0.9 * error_of(counts, middle, np.float32(whole), np.uint8(np.rint(-low / whole)))
    for a in np.linspace(0.2, 1, 9):
        for b in np.linspace(0.05, 1, 20):
            scale = (b * high - a * low) / 255
            assert found < 1.15 * error_of(counts, middle, np.float32(scale), np.uint8(np.rint(-a * low / scale)))


def test_outliers_that_matter_are_kept():
    x = np.concatenate([np.linspace(-1, 1, 100), np.full(100, 50.0)])
    counts = np.histogram(x, 4096, (-1.0, 50.0))[0]
    scale, zero = _best(counts, -1.0, 50.0)
    assert Range(scale, zero, x).rounded(np.array([50.0]))[0] > 49


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x, attention_mask):
        return self.down(torch.relu(self.up(x))) * attention_mask[..., None]


def test_padding_does_not_count(tmp_path):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"x": x, "attention_mask": mask}
    path = write(capture(randomise(Named()), inputs), tmp_path / "named")
    padded = {**inputs, "x": torch.where(mask[..., None] != 0, x, 1e6)}
    (one,), (two,) = (measure_ranges(path, {"x"}, [Batch(given)]).values() for given in (inputs, padded))
    assert (one.scale, one.zero) == (two.scale, two.zero) and (one.rows == two.rows).all()
    assert one.scale < 0.1 and len(one.rows) == 4


def test_a_tensor_of_zeros_has_a_range_and_one_that_is_empty_has_none(tmp_path):
    inputs = {"x": torch.zeros(2, 4, 16), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    path = write(capture(randomise(Named()), inputs), tmp_path / "named")
    (found,) = measure_ranges(path, {"x"}, [Batch(inputs)]).values()
    assert (found.scale, found.zero) == (1, 0)
    hidden = Batch({**inputs, "attention_mask": torch.zeros(2, 4, dtype=torch.long)})
    assert measure_ranges(path, {"x"}, [hidden]) == {}
