"""Measure what layers cost in onnxruntime on this machine, as a `CostModel`.

Layers of equal signature share a row. For a grid of legal sizes each type's region is cut, fused, lowered and written
by the code that writes artifacts, and run in a plain session; so are whole models cut to a few sizes, which calibrate
and validate the sum. All of them run interleaved, round by round. Only shapes matter: units are kept from the first on,
and nothing is refitted. `docs/latency.md` says how far this holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.example_inputs import PAST_SEQUENCE
from tilecut_passes.graph import Graph
from tilecut_passes.layer_region import LayerRegion, find_region, signature_of
from tilecut_passes.search import Lattice
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.processor import processor_name
from tilecut_targets.cache_cost_model import file_of, read_cost_model, write_cost_model
from tilecut_targets.cost_model import CostModel, LayerTable, clock, fit
from tilecut_targets.edge.contend import plain_session
from tilecut_targets.edge.time_samples import ROUNDS, OpenModel, Progress, Sample, cut, record, time_samples
from tilecut_targets.export_program import example_inputs
from tilecut_targets.target import Target

# Change it when what is measured changes: files of another format are not read.
FORMAT = 2
# Sizes a kind where one kind is alone; sets of several kinds share about LAYERS_A_TYPE.
POINTS, LAYERS_A_TYPE = 5, 16
# More kinds together have too many combinations to measure.
MOST_KINDS = 4
# Whole models: the fraction that the sets of groups keep, in turn.
WHOLE = {"dense": (1.0,), "3/5 of all": (0.6,), "3/4 and 1/4 in turn": (0.75, 0.25), "1/4 of all": (0.25,)}


@dataclass(frozen=True)
class LayerType:
    """Sets of groups with one signature: the region of the first stands for all. `grid` are the sizes to measure."""

    region: LayerRegion
    sets: list[tuple[str, ...]]
    grid: tuple[tuple[int, ...], ...]


def measure_layers(
    target: Target,
    dense: Graph,
    axes: Axes,
    groups: Sequence[Group],
    sets: Sequence[Sequence[str]],
    at: Mapping[str, int],
    lattice: Lattice,
    folder: Path | None,
    progress: Progress,
    open_model: OpenModel = plain_session,
    runtime: str | None = None,
) -> CostModel:
    """The cost model of a dense graph at the sizes of `at`, from `folder` where it is kept there.

    Args:
        open_model: opens a written model to be timed; by default in onnxruntime.
        runtime: what that is, with its version, where it is not onnxruntime.

    Raises:
        ConfigError: there are no groups.
        LoweringError: a layer cannot be written.
    """
    if not sets:
        raise ConfigError("latency", "no group of the model can be cut: there is no latency to choose")
    types = layer_types(target, axes, groups, sets, lattice)
    sizes, threads = sizes_at(dense, at), at.get("threads", 1)
    key = cache_key(target, dense, types, sizes, threads) | ({"runtime": runtime} if runtime else {})
    note = None
    path = None if folder is None else file_of(Path(folder), key)
    if path is not None:
        kept = read_cost_model(path, key)
        if isinstance(kept, CostModel):
            return kept
        if kept is not None:
            note = f"latency: the kept cost model {path.name} was of no use ({kept}) and was measured again"
    model = _measure(target, dense, groups, types, sizes, threads, lattice, progress, open_model, runtime)
    if path is not None:
        write_cost_model(path, key, model)
    return replace(model, notes=(*model.notes, note)) if note else model


def layer_types(
    target: Target, axes: Axes, groups: Sequence[Group], sets: Sequence[Sequence[str]], lattice: Lattice
) -> list[LayerType]:
    """The types of layer among the sets, in graph order."""
    by_name = {g.name: g for g in groups}
    found: dict[str, LayerType] = {}
    for names in sets:
        if len(names) > MOST_KINDS:
            raise ConfigError(
                "latency",
                f"{names[0]} shares contractions with {len(names) - 1} other groups",
                wanted=f"at most {MOST_KINDS} groups in a layer",
                fix="leave some of them out with `keep`, or give another budget",
            )
        region = find_region(axes, [by_name[name] for name in names])
        known = found.setdefault(region.signature, LayerType(region, [], grid_of(target, lattice, region.groups)))
        known.sets.append(tuple(names))
    return list(found.values())


def grid_of(target: Target, lattice: Lattice, groups: Sequence[Group]) -> tuple[tuple[int, ...], ...]:
    """The sizes to measure: the least and the greatest legal one of every group, and some between, evenly.

    They come from the target's own lattice, so that one model serves every block that a caller asks for.
    """
    points = min(POINTS, max(2, round(LAYERS_A_TYPE ** (1 / len(groups)))))
    return tuple(spread(target.emitted_sizes(lattice, g), points) for g in groups)


def spread(legal: Sequence[int], points: int) -> tuple[int, ...]:
    """About `points` of the sizes, from the first to the last, evenly spaced."""
    wanted = np.linspace(legal[0], legal[-1], points)
    return tuple(sorted({nearest(legal, w) for w in wanted}))


def nearest(legal: Sequence[int], wanted: float) -> int:
    """The legal size closest to what is wanted."""
    return min(legal, key=lambda n: abs(n - wanted))


def sizes_at(graph: Graph, at: Mapping[str, int]) -> dict[str, int]:
    """Every dynamic size as a number: as `at` names it, else its batch or sequence, within what the model allows.

    With a cache, `sequence` is the past and the present together.
    """
    rows = graph.row_sizes()
    sequence, batch = at.get("sequence", 128), at.get("batch", 1)
    wanted = {name: at.get(name, batch if name in rows else sequence) for name in graph.dims.values()}
    if {PAST_SEQUENCE, "sequence"} <= wanted.keys() and PAST_SEQUENCE not in at:
        wanted[PAST_SEQUENCE] = sequence // 2
        wanted["sequence"] = sequence - sequence // 2
    return {name: graph.ranges[name].nearest(n) for name, n in wanted.items()}


def cache_key(
    target: Target, dense: Graph, types: Sequence[LayerType], sizes: Mapping[str, int], threads: int
) -> dict[str, Any]:
    """What a measured model holds for."""
    return {
        "format": FORMAT,
        "processor": processor_name(),
        "threads": threads,
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "target": str(target),
        "quantize": target.quantize,
        "sizes": dict(sizes),
        "model": signature_of(dense),
        "layers": [[t.region.signature, [list(s) for s in t.sets], [list(g) for g in t.grid]] for t in types],
    }


def _measure(
    target: Target,
    dense: Graph,
    groups: Sequence[Group],
    types: Sequence[LayerType],
    sizes: Mapping[str, int],
    threads: int,
    lattice: Lattice,
    progress: Progress,
    open_model: OpenModel,
    runtime: str | None,
) -> CostModel:
    runs = whole_models(target, lattice, groups, types)
    inputs = example_inputs(dense, dict(sizes))
    samples = itertools.chain(whole_samples(dense, groups, runs, inputs), region_samples(dense, types, inputs))
    count = len(runs) + sum(len(list(itertools.product(*t.grid))) for t in types)

    def evaluate(ms: Mapping[str, float]) -> CostModel:
        layers = []
        for i, one in enumerate(types):
            values = [ms[_name(i, point)] for point in itertools.product(*one.grid)]
            table = LayerTable(
                [g.kind for g in one.region.groups],
                one.grid,
                np.array(values).reshape([len(axis) for axis in one.grid]),
                one.region.signature,
            )
            layers += [(names, table) for names in one.sets]
        facts = {
            "processor": processor_name(),
            **({"runtime": runtime} if runtime else {"onnxruntime": ort.__version__}),
            "threads": threads,
            "sizes": dict(sizes),
            "clock": clock(threads),
            "rounds": ROUNDS,
        }
        return fit(layers, [(name, counts, ms[name]) for name, counts in runs.items()], facts)

    return time_samples(target, samples, count, threads, evaluate, progress, open_model)


def whole_models(
    target: Target, lattice: Lattice, groups: Sequence[Group], types: Sequence[LayerType]
) -> dict[str, dict[str, int]]:
    """The whole models to measure: the size of every group in them."""
    by_name = {g.name: g for g in groups}
    sets = [names for one in types for names in one.sets]
    place = {name: i for i, name in enumerate(g.name for g in groups)}
    sets.sort(key=lambda names: place[names[0]])
    runs: dict[str, dict[str, int]] = {}
    for name, fractions in WHOLE.items():
        counts = {}
        for names, fraction in zip(sets, itertools.cycle(fractions)):
            for each in names:
                legal = target.emitted_sizes(lattice, by_name[each])
                dense = lattice.emitted(by_name[each].kind, by_name[each].size)
                counts[each] = dense if fraction == 1 else nearest(legal, fraction * by_name[each].size)
        # In a small model two fractions may be the same sizes.
        if counts not in runs.values():
            runs[name] = counts
    return runs


def whole_samples(
    dense: Graph, groups: Sequence[Group], runs: Mapping[str, Mapping[str, int]], inputs: Mapping[str, Tensor]
) -> Iterator[Sample]:
    """The dense graph cut to the sizes of every run."""
    by_name = {g.name: g for g in groups}
    for name, counts in runs.items():
        yield cut(name, dense, [by_name[n] for n in counts], list(counts.values()), inputs)


def region_samples(dense: Graph, types: Sequence[LayerType], inputs: Mapping[str, Tensor]) -> Iterator[Sample]:
    """Every type's region cut to every point of its grid, with the values that the dense model gives it."""
    values = record(dense, inputs, {name for one in types for name in one.region.graph.inputs})
    for i, one in enumerate(types):
        graph = one.region.graph
        own = {name: values[name] for name in graph.inputs}
        for point in itertools.product(*one.grid):
            yield cut(_name(i, point), graph, one.region.groups, point, own)


def _name(index: int, point: Sequence[int]) -> str:
    return f"layer type {index} at {' x '.join(map(str, point))}"
