"""Inputs to verify with, made up to fit a graph: ragged batches at several lengths, token ids over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilecut.find_lengths import find_lengths
from tilecut.make_bounds import find_bounds
from tilecut_passes.calibration import Batch
from tilecut_passes.example_inputs import PAST_SEQUENCE
from tilecut_passes.find_hiding import may_mask
from tilecut_passes.graph import Graph, number_of, size_at, symbols_of
from tilecut_runtime.reference import Case

# (batch, length) of the cases; lengths are cut to what the model allows.
SIZES = ((1, 1), (1, 8), (2, 13), (5, 64), (8, 256), (1, 512))


def make_inputs(
    graph: Graph, batch: int, length: int, seed: int, ragged: bool = True, whole: bool = True
) -> dict[str, Tensor]:
    """Random inputs: ids from the embedding that reads them, masks right-padded to random lengths (the first row `whole`).
    Bools [B, S] are masks where their capture says so; those [S, S] are causal. Lengths are such numbers; with 0 a row
    would see no key, and what comes out then is no one's to say.

    Every dynamic size that is not the first of its inputs is `length`, within its own range; with a cache, `length` is
    the past and the present together. Bounds of packed sequences divide their tokens among `batch` of them, or more.
    """
    rows = graph.row_sizes()
    sizes = {name: graph.ranges[name].nearest(batch if name in rows else length) for name in graph.dims.values()}
    if {PAST_SEQUENCE, "sequence"} <= sizes.keys():
        # Past and present share the model's positions; a length of one has no past.
        total = sizes["sequence"]
        sizes[PAST_SEQUENCE] = graph.ranges[PAST_SEQUENCE].nearest(total // 2)
        sizes["sequence"] = max(total - sizes[PAST_SEQUENCE], 1)
    generator = torch.Generator().manual_seed(seed)
    at = {symbol: sizes[name] for symbol, name in graph.dims.items()}
    bounds = find_bounds(graph)
    for one in bounds.values():
        for symbol in symbols_of(one.size):
            name = graph.dims[symbol]
            sizes[name] = graph.ranges[name].nearest(one.count(batch, at) + 1)
    places, rows_of = find_lengths(graph), graph.table_rows()
    out = {}
    for name, spec in zip(graph.inputs, graph.input_specs(), strict=True):
        shape = [size_at(s, sizes) for s in spec.shape]
        dtype = getattr(torch, spec.dtype)
        if name in bounds:
            out[name] = bounds[name].make(shape[0], at, generator).to(dtype)
        elif dtype.is_floating_point:
            out[name] = torch.randn(shape, generator=generator).to(dtype)
        elif name in graph.unclear:
            # Neither all nor nothing, along rows and columns.
            out[name] = (torch.arange(shape[0])[:, None] + torch.arange(shape[1])) % 2 * (min(shape) > 1) == 1
        elif may_mask(name, len(shape), dtype):
            square = spec.shape[0] == spec.shape[1]
            lengths = torch.arange(1, shape[0] + 1) if square else _ragged(shape[0], shape[1], generator, whole)
            real = torch.arange(shape[1])[None] < lengths[:, None] if ragged else torch.ones(shape, dtype=torch.bool)
            out[name] = (~real if name in graph.hiding else real).to(dtype)
        elif name in places:
            most = number_of(places[name], at)
            out[name] = (_ragged(shape[0], most, generator, whole) if ragged else torch.full(shape, most)).to(dtype)
        else:
            out[name] = torch.randint(0, rows_of.get(name, 2), shape, generator=generator).to(dtype)
    return out


def _ragged(rows: int, most: int, generator: torch.Generator, whole: bool) -> Tensor:
    """Random lengths of at least one; the first row is whole, or half of it."""
    lengths = torch.randint(1, most + 1, (rows,), generator=generator)
    lengths[0] = most if whole else max(most // 2, 1)
    return lengths


def make_cases(graph: Graph, seed: int = 0, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Case]:
    """Cases whose expected outputs are the graph's own."""
    cases = []
    seen = set()
    for i, (batch, length) in enumerate(sizes):
        inputs = make_inputs(graph, batch, length, seed + i)
        shapes = tuple(tuple(t.shape) for t in inputs.values())
        if shapes not in seen:
            seen.add(shapes)
            cases.append(make_case(inputs, graph.run(inputs), graph.hiding))
    if len(cases) == 1:
        # Of static sizes: a single row would never be padded.
        inputs = make_inputs(graph, *sizes[0], seed + len(sizes), whole=False)
        cases.append(make_case(inputs, graph.run(inputs), graph.hiding))
    return cases


def make_case(inputs: dict[str, Tensor], outputs: dict[str, Tensor], hiding: tuple[str, ...] = ()) -> Case:
    """A case from torch tensors; padded positions of an output do not count (`hiding`: see `Batch`)."""
    batch = Batch(inputs, hiding=hiding)
    valid = {}
    for name, value in outputs.items():
        mask = batch.valid(value)
        valid[name] = (mask if mask is not None else torch.ones(value.shape[:1], dtype=torch.bool)).numpy()
    return Case({k: v.numpy() for k, v in inputs.items()}, {k: v.detach().numpy() for k, v in outputs.items()}, valid)
