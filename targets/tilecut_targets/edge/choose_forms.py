"""Choose the fastest form of every kind of computation in a graph, by the clock of the machine that compiles.

Up to three sites of a kind, the smallest, the middle and the largest, are written in each of its forms by the code that
writes artifacts, and run interleaved in plain sessions with the values that the model gives them. The sum of their
times decides. The first form stays unless another is faster by `MARGIN`: within it, two measurements may differ.

Where nothing is measured, `forms.json` is asked, which `benchmarks/measure_forms.py` made for a version of onnxruntime: the
row of the same kind that is nearest in weights and in rows (batch times sequence). A choice that differs from what that
table says is told.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from tilecut_passes.graph import Graph
from tilecut_passes.layer_region import signature_of
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.processor import processor_name
from tilecut_runtime.timing import time_interleaved
from tilecut_targets.cost_model import clock, latency_ms
from tilecut_targets.edge.contend import plain_session
from tilecut_targets.edge.find_sites import find_sites
from tilecut_targets.edge.forms import FORMS, Forms, write_forms
from tilecut_targets.edge.measure_layers import sizes_at
from tilecut_targets.edge.time_samples import record
from tilecut_targets.export_program import example_inputs
from tilecut_targets.keep_json import kept_file, read_kept, write_kept

# Change it when what is measured changes: files of another format are not read.
FORMAT = 2
TABLE = "forms.json"
ROUNDS, WARMUP = 30, 3
MARGIN = 0.03
# Rows of forms.json further than this factor away, in weights times rows, say nothing.
NEAR = 8.0
MEASURED, KEPT, SHIPPED, DEFAULT = "measured", "kept measurement", "table of the onnxruntime version", "not measured"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Choice:
    """The form of one kind and why.

    Attributes:
        ms: form -> milliseconds of the sites that were timed, together; empty where nothing was.
        sites: how many the graph has.
        source: where `ms` is from.
        note: what the reader of a report should know.
    """

    kind: str
    form: str
    source: str
    sites: int
    ms: Mapping[str, float] = field(default_factory=dict)
    clock: str | None = None
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        held = {"form": self.form, "source": self.source, "sites": self.sites}
        held |= {"ms": {k: round(v, 4) for k, v in self.ms.items()}, "clock": self.clock} if self.ms else {}
        return held | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Chosen:
    """The forms of a graph."""

    forms: Forms
    choices: tuple[Choice, ...]


def choose_forms(
    graph: Graph, at: Mapping[str, int], measure: bool, folder: Path | None, progress: Progress | None = None
) -> Chosen:
    """The forms for a fused graph.

    Args:
        at: batch, sequence and threads of the run.
        measure: time what `folder` does not hold; else the shipped table decides.
        folder: where measurements are kept; None keeps none.
        progress: told of steps done and steps in all.

    Raises:
        LoweringError: a site cannot be written.
    """
    sizes, threads = sizes_at(graph, at), at.get("threads", 1)
    given: Mapping[str, Tensor] | None = None
    choices = []
    for kind in FORMS:
        sites = list(find_sites(graph, kind))
        if not sites:
            continue
        samples = representatives(sites)
        found = Choice(kind, next(iter(FORMS[kind])), DEFAULT, len(sites))
        shipped = shipped_row(kind, max(map(weights_of, samples)), math.prod(sizes.values()), threads)
        key = cache_key(kind, samples, sizes, threads)
        path = None if folder is None else kept_file(folder, "forms", key)
        held = None if path is None else read_kept(path, key, "ms")
        if isinstance(held, dict) and set(held) == set(FORMS[kind]):
            found = replace(found, ms=held, source=KEPT, clock=clock(threads))
        elif measure:
            given = given if given is not None else example_inputs(graph, sizes)
            ms = time_forms(graph, kind, samples, given, threads, progress)
            found = replace(found, ms=ms, source=MEASURED, clock=clock(threads))
            if isinstance(held, str):
                found = replace(found, note=f"the kept measurement was of no use: {held}")
            if path is not None:
                write_kept(path, key, "ms", ms)
        elif shipped is not None:
            found = replace(found, ms=shipped["ms"], source=SHIPPED, clock=shipped["clock"])
        choices.append(_decide(found, shipped))
    return Chosen(Forms(**{one.kind: one.form for one in choices}), tuple(choices))


def _decide(found: Choice, shipped: Mapping[str, Any] | None) -> Choice:
    found = replace(found, form=fastest(found.ms)) if found.ms else found
    if shipped is not None and found.source in (MEASURED, KEPT) and (other := fastest(shipped["ms"])) != found.form:
        return replace(found, note=f"{TABLE} says {other}, which was measured on {shipped['processor']}")
    return found


def fastest(ms: Mapping[str, float]) -> str:
    """The first form, unless another is faster by more than `MARGIN`."""
    first = next(iter(ms))
    best = min(ms, key=lambda form: ms[form])
    return best if ms[best] < (1 - MARGIN) * ms[first] else first


def representatives(sites: Sequence[Graph]) -> list[Graph]:
    """One site each of the smallest, the middle and the largest that differ."""
    different = {signature_of(site): site for site in reversed(sites)}
    ordered = sorted(different.values(), key=weights_of)
    return [ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})] if ordered else []


def weights_of(site: Graph) -> int:
    """The elements of a site's weights: what tells a large layer from a small one."""
    return sum(tensor.numel() for tensor in site.tensors.values())


def cache_key(kind: str, samples: Sequence[Graph], sizes: Mapping[str, int], threads: int) -> dict[str, Any]:
    """What a measurement holds for."""
    return {
        "format": FORMAT,
        "processor": processor_name(),
        "threads": threads,
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "kind": kind,
        "forms": list(FORMS[kind]),
        "sizes": dict(sizes),
        "sites": [signature_of(site) for site in samples],
    }


def time_forms(
    graph: Graph,
    kind: str,
    samples: Sequence[Graph],
    given: Mapping[str, Tensor],
    threads: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Milliseconds of each form, all samples together."""
    values = record(graph, given, {name for site in samples for name in site.inputs})
    step = progress or (lambda done, of: None)
    steps = len(samples) * len(FORMS[kind]) + WARMUP + ROUNDS
    with tempfile.TemporaryDirectory() as scratch:
        runners: dict[str, Callable[[], object]] = {}
        for i, site in enumerate(samples):
            arrays = {name: values[name].numpy() for name in site.inputs}
            for form in FORMS[kind]:
                path = write_form(site, kind, form, Path(scratch) / f"{len(runners)}.onnx")
                session = plain_session(path, threads)
                runners[f"{i} {form}"] = lambda run=session, x=arrays: run(x)
                step(len(runners), steps)
        counted = lambda done, of: step(len(runners) + done, steps)
        timings = time_interleaved(runners, ROUNDS, WARMUP, counted)
    return {
        form: sum(latency_ms(timings[f"{i} {form}"], threads) for i in range(len(samples))) for form in FORMS[kind]
    }


def write_form(site: Graph, kind: str, form: str, path: Path) -> Path:
    """A site in one of its forms, everything else in the first."""
    lowered, forms = site.copy(), Forms(**{kind: form})
    run_passes(lowered, forms.passes)
    write_forms(lowered, path, forms)
    return path


@functools.cache
def read_table() -> dict[str, Any]:
    """The shipped rows of every version of onnxruntime."""
    return json.loads(resources.files("tilecut_targets.edge").joinpath(TABLE).read_text(encoding="utf-8"))


def shipped_row(kind: str, weights: int, rows: int, threads: int) -> dict[str, Any] | None:
    """The row of this onnxruntime that is nearest in size; None where none is near."""
    version = read_table().get(".".join(ort.__version__.split(".")[:2]))
    if version is None:
        return None
    held = [row for row in version["rows"] if row["kind"] == kind and row["threads"] == threads]
    away = lambda row: sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in ((row["weights"], weights), (row["rows"], rows)))
    near = min(held, key=away, default=None)
    if near is None or away(near) > math.log(NEAR) or set(near["ms"]) != set(FORMS[kind]):
        return None
    ms = {form: near["ms"][form] for form in FORMS[kind]}
    return {"ms": ms, "clock": near["clock"], "processor": version["processor"]}
