"""What `attention.py` and `varlen.py` share: contenders that may be missing, fail or be wrong; clocks; what is written.

Every contender has a row. Its `status` is "ok"; "missing" where a package or a device is not there; "failed" where it
raised; "wrong" where its numbers are not the reference's; "left out" where the preset does not run it. `why` says more.
Only "ok" rows are timed and ranked. What one contender raises does not stop the others; a kernel that breaks the CUDA
context does.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from tilecut.describe_machine import machine
from tilecut_runtime.errors import first_line
from tilecut_runtime.timing import time_interleaved

console = Console(highlight=False)

RESULTS = Path(__file__).parent / "results"
OURS = "tilecut"
# More than any cache; writing it also keeps a GPU busy until the next launch is queued, which takes Python some 0.2 ms.
FLUSHED_BYTES = 4 * 2**30
LISTED = ("triton", "transformers", "flash-attn", "xformers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")

# Contenders and reasons that were printed.
SAID: set[tuple[str, str]] = set()

Row = dict[str, Any]
Run = Callable[[], object]


class Missing(Exception):
    """A contender that cannot be here; says why."""


class LeftOut(Exception):
    """A contender that this preset does not run; says why."""


def need(module: str) -> Any:
    """Another library's module, or `Missing`."""
    try:
        return importlib.import_module(module)
    except Exception as e:
        # A build for another torch raises what it likes.
        raise Missing(f"cannot import {module}: {first_line(e)}") from e


class Entry(NamedTuple):
    """A contender that ran once: how to run it again, and how far it was from the reference."""

    run: Run
    error: float


@dataclass
class Clock:
    """Interleaved rounds on one device: CUDA events there, CPU time of this process elsewhere."""

    device: torch.device
    rounds: int
    warmup: int
    flush: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        if self.device.type == "cuda":
            self.flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=self.device)

    def describe(self) -> str:
        """What the milliseconds are."""
        if self.device.type == "cuda":
            return f"CUDA events, medians of {self.rounds} interleaved rounds, L2 flushed before every run"
        return f"CPU time of the process, medians of {self.rounds} interleaved rounds, no cache flushed"

    def time(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Milliseconds of each."""
        if self.flush is None:
            return {name: t.cpu_ms for name, t in time_interleaved(runs, self.rounds, self.warmup).items()}
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        for i in range(self.warmup + self.rounds):
            for name, run in runs.items():
                pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                self.flush.zero_()
                pair[0].record()
                run()
                pair[1].record()
                if i >= self.warmup:
                    events[name].append(pair)
        torch.cuda.synchronize()
        return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def race(
    case: Row,
    makers: Mapping[str, Callable[[], Entry]],
    clock: Clock,
    tolerance: float,
) -> list[Row]:
    """The rows of one case: each contender is made, compared with the reference and, where it is right, timed.

    Args:
        case: what all rows hold.
        makers: by contender; raise `Missing`, or anything.
        tolerance: the largest error of one that is right.
    """
    rows: list[Row] = []
    runs: dict[str, Run] = {}
    for name, make in makers.items():
        row: Row = {**case, "name": name, **attempt(make, tolerance)}
        run = row.pop("run")
        if row["status"] == "ok":
            runs[name] = run
        rows.append(row)
    failed: dict[str, str] = {}
    times = clock.time({name: _guarded(name, run, failed) for name, run in runs.items()}) if runs else {}
    for row in rows:
        if row["name"] in failed:
            row |= {"status": "failed", "why": f"while timed: {failed[row['name']]}"}
        elif row["name"] in times:
            row["ms"] = times[row["name"]]
    del runs
    release()
    return rows


def _guarded(name: str, run: Run, failed: dict[str, str]) -> Run:
    """A run that does no more once it raised, and says why."""

    def guarded() -> None:
        if name not in failed:
            try:
                run()
            except Exception as e:
                failed[name] = first_line(e)

    return guarded


def attempt(make: Callable[[], Entry], tolerance: float) -> Row:
    """A contender's status, why, error, and its run where it is right."""
    found: Row = {"status": "ok", "why": None, "error": None, "run": None}
    try:
        entry = make()
    except Missing as e:
        return found | {"status": "missing", "why": str(e)}
    except LeftOut as e:
        return found | {"status": "left out", "why": str(e)}
    except Exception as e:
        release()
        return found | {"status": "failed", "why": first_line(e)}
    found |= {"error": entry.error, "run": entry.run}
    # NaN is not within any tolerance.
    if not entry.error <= tolerance:
        found |= {"status": "wrong", "why": f"error {entry.error:.2e}, at most {tolerance:.2e} is right"}
    return found


def release() -> None:
    """Give a GPU's memory back, so that one contender's does not weigh on the next."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64."""
    want = want.double()
    return float((got.double().to(want.device) - want).norm() / want.norm())


class Goal(NamedTuple):
    """What is wanted, on an H100: at least (or at most) `wanted`; `got` are the figures of the cases that it is about."""

    what: str
    wanted: float
    got: Sequence[float]
    at_most: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """In every case; None where nothing was measured."""
        if not self.got:
            return None
        return max(self.got) <= self.wanted if self.at_most else min(self.got) >= self.wanted

    def cells(self) -> list[str]:
        """What is printed."""
        sign = "<=" if self.at_most else ">="
        shown = "not measured"
        if self.got:
            low, middle, high = min(self.got), statistics.median(self.got), max(self.got)
            shown = f"{middle:.2f} {self.unit}"
            shown += f" ({low:.2f} to {high:.2f} in {len(self.got)} cases)" if len(self.got) > 1 else ""
        return [
            self.what,
            f"{sign} {self.wanted:g} {self.unit}",
            shown,
            {None: "-", True: "yes", False: "no"}[self.met],
        ]


def times_peer(
    rows: Sequence[Row], peer: str, mine: str = OURS, where: Callable[[Row], bool] = lambda row: True
) -> list[float]:
    """In every case that both finished, the peer's time over ours: above 1 we are faster."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("ms") and where(row):
            times.setdefault(row["case"], {})[row["name"]] = row["ms"]
    return [held[peer] / held[mine] for held in times.values() if peer in held and mine in held]


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("paper", "small"), help="default: paper on CUDA, small elsewhere")
    parser.add_argument("--only", help="contenders and sections whose names hold one of these words, comma-separated")
    default = f"benchmarks/results/{name}.json, {name}-small.json for the small size"
    parser.add_argument("--output", type=Path, help=f"JSON; the PNG is written beside it; default: {default}")
    return parser


def chosen(options: argparse.Namespace, name: str) -> tuple[torch.device, str, Path]:
    """The device, the size and the output."""
    device = torch.device(options.device)
    if device.type == "cuda":
        # Events and synchronisation are the current device's.
        torch.cuda.set_device(device)
    size = options.size or ("paper" if device.type == "cuda" else "small")
    # What a small run writes must not be taken for a result.
    output = options.output or RESULTS / (f"{name}.json" if size == "paper" else f"{name}-small.json")
    return device, size, output


def wanted(only: str | None, *names: str) -> bool:
    """Whether one of the words of `--only` is in one of the names."""
    return only is None or any(word.strip().lower() in name.lower() for word in only.split(",") for name in names)


def environment(device: torch.device) -> Row:
    """What ran where."""
    versions = {}
    for package in LISTED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpu = None
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device)
        gpu = {"name": held.name, "processors": held.multi_processor_count, "bytes": held.total_memory}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **versions,
    }


def write(output: Path, header: Row, rows: Sequence[Row], goals: Sequence[Goal]) -> None:
    """The JSON, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    told = [{**goal._asdict(), "got": list(goal.got), "met": goal.met} for goal in goals]
    new = output.with_suffix(".new")
    new.write_text(json.dumps({**header, "goals": told, "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
    new.rename(output)


def show(title: str, rows: Sequence[Row], columns: Mapping[str, str], mine: str = OURS) -> None:
    """A table of one case: error, milliseconds, times ours, and the `columns` (figure of a row -> its format).

    Why a contender is not ranked is said below, once for all tables.
    """
    table = Table(title=title, title_justify="left")
    for name in ("contender", "error", "ms", "times ours", *columns):
        table.add_column(name, justify="left" if name == "contender" else "right")
    table.add_column("status")
    ours = next((row["ms"] for row in rows if row["name"] == mine and row.get("ms")), None)
    for row in rows:
        ms = row.get("ms")
        cells = [row["name"], "" if row["error"] is None else f"{row['error']:.1e}", "" if ms is None else f"{ms:.3f}"]
        cells.append(f"{ms / ours:.2f}" if ms and ours else "")
        cells += [format(row[name], form) if row.get(name) is not None else "" for name, form in columns.items()]
        table.add_row(*cells, row["status"])
    console.print(table)
    for row in rows:
        if row["why"] and (row["name"], row["why"]) not in SAID:
            SAID.add((row["name"], row["why"]))
            console.print(f"  {row['name']} {row['status']}: {row['why']}", markup=False, soft_wrap=True)


def finish(output: Path, rows: Sequence[Row], goals: Sequence[Goal], unit: str) -> None:
    """The picture beside the JSON, and every goal beside what was measured; met only where every case meets it."""
    draw(rows, output.with_suffix(".png"), unit)
    table = Table(title="goals, on one H100", title_justify="left")
    for name in ("what", "wanted", "got: median", "met"):
        table.add_column(name)
    for goal in goals:
        table.add_row(*goal.cells())
    console.print(table)
    console.print(f"written to {output} and {output.with_suffix('.png')}", soft_wrap=True)


def draw(rows: Sequence[Row], path: Path, unit: str) -> None:
    """Bars: a panel for each `panel`, groups by `x`, a colour for each `series`, heights `height` in the row's `unit`."""
    # No pyplot: it keeps figures, and picks a window system.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.get("height") is not None]
    panels = list(dict.fromkeys(row["panel"] for row in shown))
    colours = {name: colormaps["tab10"](i % 10) for i, name in enumerate(dict.fromkeys(r["series"] for r in shown))}
    across = min(4, max(1, len(panels)))
    down = max(1, math.ceil(len(panels) / across))
    figure = Figure(figsize=(5 * across, 3.6 * down), dpi=90, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels):
        mine = [row for row in shown if row["panel"] == panel]
        places = {x: i for i, x in enumerate(dict.fromkeys(row["x"] for row in mine))}
        series = list(dict.fromkeys(row["series"] for row in mine))
        width = 0.8 / len(series)
        for i, name in enumerate(series):
            held = [row for row in mine if row["series"] == name]
            at = [places[row["x"]] - 0.4 + (i + 0.5) * width for row in held]
            axis.bar(at, [row["height"] for row in held], width, color=colours[name], label=name)
        axis.set_xticks(range(len(places)), list(places), rotation=30, ha="right", fontsize=7)
        axis.set_title(panel, fontsize=9)
        axis.set_ylabel(mine[0].get("unit", unit), fontsize=8)
        axis.legend(fontsize=6)
    figure.savefig(path)
