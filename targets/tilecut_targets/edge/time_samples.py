"""Time graphs as they would be deployed: each written by the code that writes artifacts, run in a plain session.

Before: graphs, with real inputs. After: milliseconds of each, from runs that are interleaved round by round. The graphs
that are given are legalized in place; their files are gone afterwards.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tilecut_passes.axes.groups import Group
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.layer_region import resizing
from tilecut_passes.prune import Prune, as_cut
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.reference import Arrays
from tilecut_runtime.timing import time_interleaved
from tilecut_targets.cost_model import TRUSTED, CostModel, latency_ms
from tilecut_targets.edge.contend import plain_session
from tilecut_targets.target import Target

ROUNDS, WARMUP = 30, 3

Progress = Callable[[int, int], None]
# Opens a written model on a number of threads.
OpenModel = Callable[[Path, int], Callable[[Arrays], object]]


@dataclass(frozen=True)
class Sample:
    """A graph to time and its inputs."""

    name: str
    graph: Graph
    inputs: Mapping[str, Tensor]


def cut(
    name: str, graph: Graph, groups: Sequence[Group], counts: Sequence[int], inputs: Mapping[str, Tensor]
) -> Sample:
    """A copy of the graph with so many units in each group, padded where it has fewer; its caches are cut with it."""
    plan = resizing(graph, groups, counts)
    small = graph.copy()
    run_passes(small, [Prune(plan)])
    return Sample(name, small, as_cut(graph, plan)(inputs))


def record(graph: Graph, inputs: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The values of the named nodes when the graph runs."""
    recorder = _Record(graph.module, wanted)
    with torch.no_grad():
        recorder.run(*(inputs[name] for name in graph.inputs))
    return recorder.values


class _Record(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: set[str]):
        super().__init__(module)
        self.wanted, self.values = wanted, {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.values[n.name] = result
        return result


def time_samples(
    target: Target,
    samples: Iterable[Sample],
    count: int,
    threads: int,
    evaluate: Callable[[Mapping[str, float]], CostModel],
    progress: Progress,
    open_model: OpenModel = plain_session,
) -> CostModel:
    """Write every sample as the target writes artifacts, run all of them interleaved, and evaluate the milliseconds.

    Where the result is not to be trusted, they run once more, and what counts is the lower of two medians: other work
    on the machine only ever adds.
    """
    steps = count + WARMUP + ROUNDS
    with tempfile.TemporaryDirectory() as scratch:
        runners: dict[str, Callable[[], object]] = {}
        for i, sample in enumerate(samples):
            path = emit(target, sample.graph, sample.inputs, Path(scratch) / str(i))
            arrays = {name: sample.inputs[name].numpy() for name in sample.graph.inputs}
            session = open_model(path, threads)
            runners[sample.name] = lambda run=session, given=arrays: run(given)
            progress(i + 1, steps)
        gc.collect()

        def once(before: Mapping[str, float], done: int) -> dict[str, float]:
            counted = lambda i, of: progress(done + i, steps)
            timings = time_interleaved(runners, ROUNDS, WARMUP, counted)
            return {n: min(latency_ms(t, threads), before.get(n, np.inf)) for n, t in timings.items()}

        ms = once({}, count)
        model = evaluate(ms)
        if model.worst > TRUSTED:
            model = evaluate(once(ms, count))
        return model


def sizes_of_inputs(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The dynamic sizes that a graph's inputs have."""
    shapes = {spec.name: spec.shape for spec in graph.input_specs()}
    return {
        dim: size
        for name, shape in shapes.items()
        for dim, size in zip(shape, inputs[name].shape)
        if isinstance(dim, str) and dim in graph.ranges
    }


def emit(target: Target, graph: Graph, inputs: Mapping[str, Tensor], folder: Path) -> Path:
    """The model file that a compile of this graph would write, to serve the sizes of `inputs`."""
    run_passes(graph, target.enforce())
    fused = graph.copy()
    run_passes(fused, target.fusing)
    fused.ranges = target.ranges(graph, sizes_of_inputs(graph, inputs))
    lowered = fused.copy()
    run_passes(lowered, target.lowering)
    folder.mkdir()
    written = target.write(fused, lowered, folder)
    if target.quantize is not None:
        target.quantize_files(folder, [Batch(dict(inputs))])
    return folder / written.entry["model"]
