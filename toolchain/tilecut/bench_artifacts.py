"""`tilecut bench`: artifacts, the dense model by the same path and the peers that are installed, timed in one run.

For every number of threads everything is opened once. At every point of the grid the outputs of every contender are
compared with torch eager of its own model, on ragged inputs; what computes something else is reported and not timed.
What is left is timed round by round, on whole inputs. Memory is measured in processes of their own (`measure_memory.py`).

Artifacts alone are timed without torch too; then there is nothing to compare them with, and `error` is None.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tilecut.cli_inputs import check_size, made_up_inputs
from tilecut.describe_machine import machine, tool_versions
from tilecut.measure_memory import MemoryFailure, measure_memory, open_artifact
from tilecut.progress import Progress
from tilecut_runtime.errors import ConfigError, first_line
from tilecut_runtime.manifest import DimRange, Manifest
from tilecut_runtime.reference import Arrays
from tilecut_runtime.timing import clock, latency_ms, settle_of, time_interleaved

FORMAT = 1
# In place of the peers' names.
ALL = "all"
WARMUP = 3
# How far a peer may be from torch eager of the same model: all compute in float32, in another order.
TOLERANCE = 1e-3
MEMORY = (
    "high-water mark of the resident set of a process that opens the contender and runs it twice; all of the process"
)
# The figures of a `Timing`.
FIGURES = ("cpu_ms", "cpu_p95_ms", "wall_ms", "p95_ms")
Runner = Callable[[Arrays], Arrays]
# Batch, sequence (None where the model has none), threads.
Point = tuple[int, int | None, int]


@dataclass
class Subject:
    """A model that is timed: an artifact, or the dense model compiled into one.

    Attributes:
        name: of the artifact, in tables.
        title: of the model, before its peers' names.
        graph: None without torch, and of a model with a cache, which is timed on prompts that fill empty ones.
    """

    name: str
    title: str
    folder: Path
    manifest: Manifest
    graph: Any = None

    @property
    def has_sequence(self) -> bool:
        """Whether the inputs have a length."""
        return any(isinstance(d, str) and d != "batch" for spec in self.manifest.inputs for d in spec.shape)

    def inputs(self, batch: int, sequence: int, ragged: bool) -> Arrays:
        """Inputs of the given sizes: random ids where the graph says which there are, else ids of 1."""
        if self.graph is None:
            return made_up_inputs(self.manifest, batch, sequence)
        from tilecut.make_cases import make_inputs

        made = make_inputs(self.graph, batch, sequence, seed=5, ragged=ragged)
        return {name: value.numpy() for name, value in made.items()}

    def reference(self, inputs: Arrays) -> Any:
        """These inputs and what torch eager of this model gives for them, a `Case`; None where there is no torch."""
        if self.graph is None:
            return None
        import torch

        from tilecut.make_cases import make_case

        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return make_case(given, self.graph.run(given), self.graph.hiding)


@dataclass
class Contender:
    """Something that is timed on a subject's inputs.

    Attributes:
        kind: "artifact" or "peer".
        open: for a number of threads.
        limit: how far it may be from torch eager.
        memory: what `measure_memory` opens.
        bytes: of the files that a run needs.
    """

    name: str
    subject: Subject
    kind: str
    open: Callable[[int], Runner]
    why: Callable[[Exception], str]
    limit: float
    memory: dict[str, Any]
    bytes: int

    def error(self, case: Any, outputs: Arrays) -> float:
        """How far outputs are from a case's; those of a quantized artifact by the measure that its limit is of."""
        quantized = self.kind == "artifact" and self.subject.manifest.quantize is not None
        return case.drift(outputs)[0] if quantized else case.error(outputs)


@dataclass
class _Run:
    """What was found so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def bench_artifacts(
    folders: Sequence[Path],
    *,
    batch: Sequence[int] = (1,),
    sequence: Sequence[int] = (128,),
    threads: Sequence[int] = (1,),
    rounds: int = 30,
    device: str | None = None,
    dense: Path | None = None,
    peers: Sequence[str] = (),
    memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time artifacts, and what they are compared with, over a grid.

    Args:
        folders: artifacts; one that is named twice is timed twice.
        device: as in `load`.
        dense: folder of a Hugging Face model, compiled uncut for the artifacts' targets and timed beside them.
        peers: names out of `tilecut_targets.peers.PEERS`, or "all" alone; they run the dense model where it is given, else
            the artifacts' own.
        memory: measure every contender's memory, each in a process of its own.

    Raises:
        TilecutError: a folder is no artifact, a size is one that a model does not allow, a peer is unknown.
    """
    progress = progress or Progress()
    chosen = _find_peers(peers)
    names = _names(folders)
    titles = names if len(names) > 1 else ["same model"]
    subjects = [_subject(*given) for given in zip(folders, names, titles)]
    points = _points(subjects, batch, sequence)
    found = _Run()
    with tempfile.TemporaryDirectory() as held, _torch_threads():
        scratch = Path(held)
        contenders = [_artifact(subject, device) for subject in subjects]
        compared = subjects
        if dense is not None:
            compared = _compile_dense(dense, subjects, scratch, progress)
            contenders += [_artifact(subject, device) for subject in compared]
            points = _points([*subjects, *compared], batch, sequence)
            # Every lowering has the same dense model.
            compared = compared[:1]
        if chosen:
            with progress.stage("peers"):
                most = {"batch": max(batch), "sequence": max(sequence)}
                for i, subject in enumerate(compared):
                    contenders += _make_peers(subject, chosen, most, scratch / f"peers-{i}", progress, found)
        with progress.stage("measure"):
            _time_grid(contenders, points, threads, rounds, progress, found)
        peaks: dict[str, int] = {}
        if memory:
            with progress.stage("memory"):
                peaks = _measure_memory(contenders, points, max(threads), scratch, progress, found)
        return {
            "format": FORMAT,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "tools": tool_versions(),
            "rounds": rounds,
            "warmup": WARMUP,
            "memory": MEMORY if memory else None,
            "contenders": [
                {
                    "name": c.name,
                    "kind": c.kind,
                    "model": c.subject.name,
                    "target": c.subject.manifest.target if c.kind == "artifact" else None,
                    "bytes": c.bytes,
                    "peak_memory_bytes": peaks.get(c.name),
                    "limit": c.limit,
                }
                for c in contenders
            ],
            "timings": found.rows,
            "not_run": [{"contender": name, "why": why} for name, why in found.not_run.items()],
            "notes": found.notes,
        }


def grid_points(rows: Sequence[Mapping[str, Any]]) -> dict[Point, list[Mapping[str, Any]]]:
    """The rows of a report by the point of the grid that they belong to."""
    points: dict[Point, list[Mapping[str, Any]]] = {}
    for row in rows:
        points.setdefault((row["batch"], row["sequence"], row["threads"]), []).append(row)
    return points


def title_of(point: Point) -> str:
    """A point of the grid in words, and which time counts there."""
    batch, sequence, threads = point
    length = "" if sequence is None else f", sequence {sequence}"
    return f"batch {batch}{length}, {threads} thread{'s' * (threads > 1)}: {_CLOCKS[clock(threads)]} time"


_CLOCKS = {"cpu": "CPU", "wall": "wall"}


def _find_peers(names: Sequence[str]) -> list[Any]:
    if not names:
        return []
    from tilecut_targets.peers import PEERS

    wanted = list(PEERS) if list(names) == [ALL] else list(dict.fromkeys(names))
    for name in wanted:
        if name not in PEERS:
            raise ConfigError("--peers", "unknown peer", got=repr(name), wanted=f"all, none or of {', '.join(PEERS)}")
    return [PEERS[name] for name in wanted]


def _names(folders: Sequence[Path]) -> list[str]:
    return [
        f"{folder} #{folders[: i + 1].count(folder)}" if folders.count(folder) > 1 else str(folder)
        for i, folder in enumerate(folders)
    ]


def _subject(folder: Path, name: str, title: str) -> Subject:
    subject = Subject(name, title, folder, Manifest.read(folder))
    # The module of a model with a cache has none: it takes other inputs.
    if importlib.util.find_spec("torch") is not None and subject.manifest.generation is None:
        from tilecut.artifact import Artifact

        subject.graph = Artifact(folder).graph()
    return subject


def _points(subjects: Sequence[Subject], batch: Sequence[int], sequence: Sequence[int]) -> list[tuple[int, int | None]]:
    """The sizes of the grid, checked against every model; a model without a length has no sequence."""
    lengths: list[int | None] = list(sequence) if any(s.has_sequence for s in subjects) else [None]
    for subject in subjects:
        for name in {d for spec in subject.manifest.inputs for d in spec.shape if isinstance(d, str)}:
            for size in batch if name == "batch" else sequence:
                check_size(subject.manifest, name, size)
    return [(b, s) for b in dict.fromkeys(batch) for s in dict.fromkeys(lengths)]


def _artifact(subject: Subject, device: str | None) -> Contender:
    manifest = subject.manifest
    entries = manifest.entry.values()
    files = [f for f in manifest.files if any(f == e or f.startswith(f"{e}.") for e in entries)]
    return Contender(
        subject.name,
        subject,
        "artifact",
        lambda threads: open_artifact(subject.folder, device, threads),
        first_line,
        manifest.tolerance,
        {"artifact": str(subject.folder), "device": device},
        sum(manifest.files[f].bytes for f in files),
    )


def _compile_dense(model: Path, subjects: Sequence[Subject], scratch: Path, progress: Progress) -> list[Subject]:
    """The dense model through the lowering of every target among the artifacts."""
    from tilecut.compile import compile_pruned

    targets = list(dict.fromkeys(subject.manifest.target for subject in subjects))
    made = []
    for i, target in enumerate(targets):
        folder = scratch / f"dense-{i}"
        compile_pruned(model, target, config=None, output=folder, measure=False, progress=progress)
        made.append(_subject(folder, "dense, same path" + (f" ({target})" if len(targets) > 1 else ""), "dense"))
    return made


def _make_peers(
    subject: Subject, chosen: Sequence[Any], most: Mapping[str, int], folder: Path, progress: Progress, found: _Run
) -> list[Contender]:
    """Write every peer's files; what cannot be written is not run."""
    folder.mkdir()
    bounded = subject.graph.copy()
    # torch takes no dynamic size that has one value only.
    for name, limits in bounded.ranges.items():
        bound = max(2, most["batch" if name in bounded.row_sizes() else "sequence"], limits.min + 1)
        bounded.ranges[name] = DimRange(limits.min, bound if limits.max is None else min(bound, limits.max))
    made = []
    for i, peer in enumerate(chosen):
        name = f"{subject.title}, {peer.title}"
        # A peer that breaks on this model is a result to report, not a reason to stop.
        try:
            peer.write(bounded if peer.bounded else subject.graph, folder)
        except Exception as e:
            found.not_run[name] = peer.why(e)
        else:
            made.append(
                Contender(
                    name,
                    subject,
                    "peer",
                    lambda threads, peer=peer: peer.open(folder, threads),
                    peer.why,
                    TOLERANCE,
                    {"peer": peer.name, "folder": str(folder)},
                    peer.bytes(folder),
                )
            )
        progress.step(i + 1, len(chosen))
    return made


def _time_grid(
    contenders: Sequence[Contender],
    points: Sequence[tuple[int, int | None]],
    threads: Sequence[int],
    rounds: int,
    progress: Progress,
    found: _Run,
) -> None:
    counts = list(dict.fromkeys(threads))
    steps, done = len(counts) * len(points) * (rounds + WARMUP), 0
    for count in counts:
        runners: dict[str, Runner] = {}
        for c in contenders:
            with _reported(c, found):
                runners[c.name] = c.open(count)
        for b, s in points:
            _time_point([c for c in contenders if c.name in runners], runners, (b, s, count), rounds, found,
                        lambda i, of, done=done: progress.step(done + i, steps))  # fmt: skip
            done += rounds + WARMUP
        # Sessions hold weights, and threads.
        runners.clear()
        gc.collect()


def _time_point(
    contenders: Sequence[Contender],
    runners: Mapping[str, Runner],
    point: Point,
    rounds: int,
    found: _Run,
    step: Callable[[int, int], None],
) -> None:
    batch, sequence, threads = point
    length = sequence or 1
    errors: dict[str, float | None] = {}
    whole: dict[str, Arrays] = {}
    compared: dict[str, tuple[Arrays, Any]] = {}
    for c in contenders:
        of = c.subject.name
        if of not in whole:
            ragged = c.subject.inputs(batch, length, ragged=True)
            compared[of] = ragged, c.subject.reference(ragged)
            whole[of] = c.subject.inputs(batch, length, ragged=False)
        given, case = compared[of]
        with _reported(c, found):
            out = runners[c.name](given)
            errors[c.name] = None if case is None else c.error(case, out)
    timed = [c for c in contenders if c.name in errors and _is_right(c, errors[c.name])]
    timings = time_interleaved(
        {c.name: lambda run=runners[c.name], given=whole[c.subject.name]: run(given) for c in timed},
        rounds,
        WARMUP,
        step,
        settle=settle_of(threads),
    )
    # The first contender, if its numbers are right.
    base = next(iter(timings), None)
    base_ms = latency_ms(timings[base], threads) if base is not None else None
    for c in contenders:
        if c.name not in errors:
            continue
        timing = timings.get(c.name)
        ms = None if timing is None else latency_ms(timing, threads)
        count, unit = _items(whole[c.subject.name], batch)
        figures = {k: None if timing is None else round(getattr(timing, k), 4) for k in FIGURES}
        found.rows.append(
            {
                "contender": c.name,
                "batch": batch,
                "sequence": sequence,
                "threads": threads,
                "status": "differs" if timing is None else "timed",
                "error": errors[c.name],
                **figures,
                "rounds": rounds if timing is not None else 0,
                "per_second": round(1e3 * count / ms, 2) if ms else None,
                "unit": unit,
                "times_first": round(ms / base_ms, 4) if ms is not None and base_ms else None,
                "base": base,
            }
        )


def _is_right(contender: Contender, error: float | None) -> bool:
    return error is None or error <= contender.limit


def _items(inputs: Arrays, batch: int) -> tuple[int, str]:
    """What a run works through: the tokens of its ids, else its rows."""
    ids = [array for array in inputs.values() if array.ndim == 2 and array.dtype.kind in "iu"]
    return (ids[0].size, "tokens") if ids else (batch, "items")


@contextlib.contextmanager
def _reported(contender: Contender, found: _Run) -> Iterator[None]:
    """A peer that fails is a result to report; an artifact that fails is an error."""
    try:
        yield
    except Exception as e:
        if contender.kind == "artifact":
            raise
        found.not_run[contender.name] = contender.why(e)


@contextlib.contextmanager
def _torch_threads() -> Iterator[None]:
    """torch's number of threads as it was, afterwards."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure_memory(
    contenders: Sequence[Contender],
    points: Sequence[tuple[int, int | None]],
    threads: int,
    scratch: Path,
    progress: Progress,
    found: _Run,
) -> dict[str, int]:
    batch, sequence = max(points, key=lambda point: point[0] * (point[1] or 1))
    peaks: dict[str, int] = {}
    saved: dict[str, Path] = {}
    for i, c in enumerate(contenders):
        if c.name not in found.not_run:
            if c.subject.name not in saved:
                path = saved[c.subject.name] = scratch / f"inputs-{len(saved)}.npz"
                np.savez(path, **c.subject.inputs(batch, sequence or 1, ragged=False))  # type: ignore[arg-type]
            try:
                peaks[c.name] = measure_memory({**c.memory, "threads": threads, "inputs": str(saved[c.subject.name])})
            # What was timed stays worth telling.
            except MemoryFailure as e:
                found.notes.append(f"{c.name}: {e}")
        progress.step(i + 1, len(contenders))
    return peaks
