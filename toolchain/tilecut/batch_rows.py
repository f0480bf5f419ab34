"""Rows of different lengths as padded batches that fit a graph.

Rows are sorted by length, so that little is padding, and padded on the right, where a causal model's real positions never
look. Padding is the tokenizer's pad id in `input_ids`, -100 in labels, 1 in masks that hide, 0 elsewhere. What follows from
the ids is added where the model takes it: `attention_mask` (1 at every id of the row), masks that hide (0),
`token_type_ids` (0), and, for an encoder with a decoder, `decoder_input_ids`: the same ids after the start token. A model
without a mask cannot tell padding: its batches hold rows of one length.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilecut_passes.align_labels import IGNORED
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.graph import Graph, size_at
from tilecut_runtime.errors import CalibrationError
from tilecut_runtime.manifest import TensorSpec

BATCH_SIZE = 64
# Numbers in the outputs of one batch, half a gigabyte: the logits of a large vocabulary limit the batch.
MAX_OUTPUTS = 2**27
# Inputs that follow from the token ids.
DERIVED = ("attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")

Row = Mapping[str, Any]


def batch_rows(graph: Graph, rows: Sequence[Row], pad: int = 0, start: int | None = None) -> list[Batch]:
    """Checked batches of all rows.

    Args:
        pad: the id that pads `input_ids`.
        start: the id that a decoder begins with; None: `pad`.

    Raises:
        CalibrationError: rows that make no tensor or do not fit the graph's inputs.
    """
    specs = graph.input_specs()
    tensors = [_complete(row, specs, pad if start is None else start, i, graph.hiding) for i, row in enumerate(rows)]
    longest = lambda row: max((t.shape[0] for t in row.values() if t.ndim), default=0)
    ranked = sorted(tensors, key=longest)
    masked = bool(graph.hiding) or any("mask" in spec.name for spec in specs)
    runs: Iterable[list[dict[str, Tensor]]]
    runs = [ranked] if masked else (list(run) for _, run in itertools.groupby(ranked, longest))
    size = batch_size(graph, max(map(longest, ranked), default=1))
    batches = [_collate(graph, run[at : at + size], specs, pad) for run in runs for at in range(0, len(run), size)]
    return check_batches(graph, batches)


def batch_size(graph: Graph, length: int) -> int:
    """Rows in a batch: `BATCH_SIZE`, fewer where the outputs of that length are large."""
    rows = graph.row_sizes()
    sizes = {name: 1 if name in rows else length for name in graph.dims.values()}
    numbers = sum(math.prod(size_at(dim, sizes) for dim in spec.shape) for spec in graph.output_specs())
    return max(1, min(BATCH_SIZE, MAX_OUTPUTS // max(numbers, 1)))


def _complete(
    row: Row, specs: Sequence[TensorSpec], start: int, index: int, hiding: Sequence[str]
) -> dict[str, Tensor]:
    """A row's tensors, with what follows from its ids."""
    names = [spec.name for spec in specs]
    held = {name: _tensor(row[name], f"calibration row {index}: {name}") for name in (*names, "labels") if name in row}
    ids = held.get("input_ids")
    if ids is None:
        return held
    made = {
        "attention_mask": lambda: torch.ones_like(ids),
        "token_type_ids": lambda: torch.zeros_like(ids),
        "decoder_input_ids": lambda: torch.cat([ids.new_tensor([start]), ids[:-1]]),
        "decoder_attention_mask": lambda: torch.ones_like(held["decoder_input_ids"]),
    }
    shapes = {spec.name: spec.shape for spec in specs}
    for name in hiding:
        if name not in held and shapes[name] == shapes["input_ids"]:
            held[name] = torch.zeros_like(ids)
    for name, make in made.items():
        if name in names and name not in held:
            held[name] = make()
    return held


def _tensor(value: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    # torch raises one or the other for objects, ragged lists, dtypes that it lacks and numbers too large.
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise CalibrationError(
            where, f"no tensor can be made of it ({str(e).partition(chr(10))[0]})", got=type(value).__name__
        ) from e


def _collate(
    graph: Graph, rows: Sequence[Mapping[str, Tensor]], specs: Sequence[TensorSpec], pad: int
) -> dict[str, Tensor]:
    """One batch; an input that a row lacks is left out, and named by the check of batches."""
    out = {}
    dims = {spec.name: spec.shape[1:] for spec in specs}
    for name in dict.fromkeys(itertools.chain.from_iterable(rows)):
        if not all(name in row for row in rows):
            raise CalibrationError("calibration", f"some rows have {name}, and some have not")
        parts = [row[name] for row in rows]
        if len({part.ndim for part in parts}) > 1:
            raise CalibrationError("calibration", f"rows of {name} differ in rank")
        sizes = [max(sizes) for sizes in zip(*(part.shape for part in parts))]
        for axis, dim in enumerate(dims.get(name, ())):
            limits = graph.ranges.get(str(dim))
            if axis < len(sizes) and limits is not None:
                sizes[axis] = max(sizes[axis], limits.min)
        fixed = [axis for axis, dim in enumerate(dims.get(name, ())) if isinstance(dim, int) and axis < len(sizes)]
        if odd := [part for part in parts if any(part.shape[axis] != sizes[axis] for axis in fixed)]:
            raise CalibrationError(
                "calibration",
                f"rows of {name} differ in a size that is fixed",
                got=list(odd[0].shape),
                wanted=list(dims[name]),
            )
        fillers = {"input_ids": pad, "decoder_input_ids": pad, "labels": IGNORED, **dict.fromkeys(graph.hiding, 1)}
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        whole = torch.full((len(parts), *sizes), fillers.get(name, 0), dtype=dtype)
        for i, part in enumerate(parts):
            whole[(i, *(slice(0, n) for n in part.shape))] = part
        out[name] = whole
    return out
