"""The ranges of activations on calibration data, for uint8 with one scale and zero point a tensor.

Two runs over the batches: the first finds the least and the largest number of every tensor, the second counts how many
numbers fall into each of `BINS` bins between them. The range is the one with the least squared error of rounding and
clipping over that histogram, searched from both ends: a few outliers are clipped where that makes the steps of all the
others finer, and kept where their own error would be larger. It always holds 0. Padded positions do not count.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from tilecut_passes.calibration import Batch
from tilecut_runtime.reference import Arrays

BINS, LEVELS = 4096, 255
# The range's ends as fractions of the largest ones, in turn from both sides.
FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
# Rows of a tensor that are kept to measure what a product loses.
ROWS = 256
# Batches that are looked at: ranges hardly change after the first ones.
BATCHES = 32


@dataclass(frozen=True)
class Range:
    """uint8 for one tensor: scale float32 [], zero uint8 []; `rows` [R, K] of it as it is."""

    scale: np.ndarray
    zero: np.ndarray
    rows: np.ndarray

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """What uint8 makes of x."""
        zero = np.float32(self.zero)
        return (np.clip(np.rint(x / self.scale) + zero, 0, LEVELS) - zero) * self.scale


Ranges = dict[str, Range]


def measure_ranges(path: Path, names: Set[str], batches: Sequence[Batch]) -> Ranges:
    """The range of each named tensor of an ONNX file; a tensor that is always empty has none."""
    session, batches = _recorder(path, names), batches[:BATCHES]
    ends: dict[str, tuple[float, float]] = {}
    rows: dict[str, list[np.ndarray]] = {}
    counts: dict[str, np.ndarray] = {}
    for values in _runs(session, names, batches):
        for name, x in values.items():
            low, high = ends.get(name, (0.0, 0.0))
            ends[name] = min(low, float(x.min())), max(high, float(x.max()))
            share = max(1, ROWS // len(batches))
            rows.setdefault(name, []).append(x[:: max(1, len(x) // share)][:share])
    for values in _runs(session, names, batches):
        for name, x in values.items():
            counts[name] = counts.get(name, 0) + np.histogram(x, BINS, ends[name])[0]
    return {
        name: Range(*_best(counts[name], *ends[name]), np.concatenate(rows[name])) for name in names if name in ends
    }


def _best(counts: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point with the least squared error over a histogram."""
    if high <= low:
        return np.array(1, np.float32), np.array(0, np.uint8)
    width = (high - low) / len(counts)
    middle = low + width * (np.arange(len(counts)) + 0.5)
    used = counts > 0
    best = (np.inf, 1.0, 0.0)
    for a in FRACTIONS:
        for b in FRACTIONS:
            scale = (b * high - a * low) / LEVELS
            if scale <= 0:
                continue
            zero = np.clip(np.rint(-a * low / scale), 0, LEVELS)
            rounded = (np.clip(np.rint(middle[used] / scale) + zero, 0, LEVELS) - zero) * scale
            error = float((counts[used] * np.square(rounded - middle[used])).sum())
            if error < best[0]:
                best = (error, scale, zero)
    return np.array(best[1], np.float32), np.array(best[2], np.uint8)


def _runs(session: ort.InferenceSession, names: Set[str], batches: Sequence[Batch]) -> Iterator[Arrays]:
    """The named tensors of every batch as rows [R, K]: padding is left out, and so are empty tensors."""
    recorded, read = [o.name for o in session.get_outputs()], {i.name for i in session.get_inputs()}
    for batch in batches:
        inputs = {name: x.numpy() for name, x in batch.inputs.items() if name in read}
        found = {name: x for name, x in inputs.items() if name in names}
        found |= dict(zip(recorded, session.run(recorded, inputs)))
        rows = {name: batch.rows(torch.from_numpy(x)).numpy() for name, x in found.items()}
        yield {name: x for name, x in rows.items() if x.size}


def _recorder(path: Path, names: Set[str]) -> ort.InferenceSession:
    """The file in a session whose outputs are the named tensors, but for those that are inputs."""
    # Weights beside the model stay there: they are found from its folder.
    model = onnx.load(str(path), load_external_data=False)
    wanted = sorted(names - {i.name for i in model.graph.input})
    if wanted:
        del model.graph.output[:]
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        return ort.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
