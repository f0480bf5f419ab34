"""What the command line prints: progress bars and tables. numpy and rich only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from tilecut.bench_artifacts import grid_points, title_of
from tilecut.progress import Progress
from tilecut_runtime.manifest import Manifest, Rung
from tilecut_runtime.timing import FLOOR, PRUNED

STATUS = {"passed": "[green]passed[/]", "failed": "[bold red]failed[/]", "not run": "[yellow]not run[/]"}


def plain(text: str) -> str:
    """Text without markup meaning."""
    return escape(text)


@contextmanager
def compile_progress(console: Console, quiet: bool) -> Iterator[Progress]:
    """A bar a stage, with steps and time left where the stage counts them."""
    if quiet:
        yield Progress()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:
        current: list[Any] = []

        def on_stage(title: str) -> None:
            finish()
            current.append(bars.add_task(escape(title), total=1))

        def on_step(done: int, of: int) -> None:
            bars.update(current[-1], completed=done, total=of)

        def finish() -> None:
            for task in current[-1:]:
                total = bars.tasks[task].total
                bars.update(task, completed=total)

        yield Progress(on_stage, on_step)
        finish()


def report(console: Console, r: Mapping[str, Any]) -> None:
    """The report's main figures as one table, then what was kept and the verification ladder."""
    table = Table(title=f"{plain(r['model'])} for {r['target']}", title_justify="left")
    table.add_column("")
    for name in ("dense", "pruned", "ratio"):
        table.add_column(name, justify="right")
    macs, parameters, sizes = r["macs"], r["parameters"], r["bytes"]
    for label, a, b in (
        ("prunable MACs", macs["prunable_dense"], macs["prunable_pruned"]),
        ("MACs", macs["dense"], macs["pruned"]),
        ("parameters", parameters["dense"], parameters["pruned"]),
        ("bytes of weights", sizes["dense_weights"], sizes["pruned_weights"]),
    ):
        table.add_row(label, f"{a:,}", f"{b:,}", f"{b / a:.3f}" if a else "")
    latency = r["latency"]
    if latency["status"] == "measured":
        rows = latency["contenders"]
        # On several threads CPU time is no latency.
        column, title = f"{latency['clock']}_ms", {"cpu": "CPU ms", "wall": "wall ms"}[latency["clock"]]
        own = rows[PRUNED][column]
        for name, row in rows.items():
            if name == PRUNED:
                continue
            ratio = f"{latency['times_floor']:.2f} of the floor" if name == FLOOR else f"{row['times_pruned']:.2f}x faster"
            table.add_row(f"{title}: {name}", f"{row[column]:.2f}", f"{own:.2f}", ratio)
    for where, fidelity in (("held-out", r["fidelity"]), ("general text", r["fidelity"].get("general", {}))):
        for name, f in fidelity.items():
            if name not in ("task", "general"):
                table.add_row(f"cosine of {name}, {where}", "1", f"{f['cosine']:.4f}", "")
        task = fidelity.get("task", {})
        for what in ("loss", "accuracy", "perplexity"):
            if f"dense_{what}" in task:
                table.add_row(f"{what}, {where}", f"{task[f'dense_{what}']:.4f}", f"{task[f'pruned_{what}']:.4f}", "")
    if r.get("quantization"):
        _quantization_rows(table, r["quantization"])
    console.print(table)
    if r.get("quantization"):
        _quantization(console, r["quantization"])
    kept: dict[str, list[str]] = {}
    for group in r["groups"]:
        kept.setdefault(group["kind"], []).append(str(group["padded_to"] or group["kept"]))
    for kind, counts in kept.items():
        console.print(f"kept {kind}: {' '.join(counts)}", highlight=False, soft_wrap=True)
    for one in r.get("tokens", []):
        text = f"kept tokens after {one['after']}: {one['kept']} of {one['of']}"
        console.print(plain(text), highlight=False, soft_wrap=True)
    if r.get("tokens"):
        whole, left = r["tokens"][0]["macs_with_all"], macs["pruned"]
        console.print(f"MACs: {left:,}, with every token {whole:,}", highlight=False, soft_wrap=True)
    for note in [*r["notes"], *(f"{x['by']} left {x['node']} alone: {x['why']}" for x in r["refusals"])]:
        console.print(f"[yellow]note:[/] {plain(note)}", highlight=False, soft_wrap=True)
    rungs(console, [Rung(**v) for v in r["verification"]])


def _quantization_rows(table: Table, q: Mapping[str, Any]) -> None:
    """What quantization made of the pruned model: bytes, and agreement with the float32 models."""
    size = q["bytes"]
    table.add_row(
        f"bytes of the model file, {q['how']}", "", f"{size['after']:,}", f"{size['after'] / size['before']:.3f} of fp32"
    )
    for to, fidelity in q.get("fidelity", {}).items():
        for name, f in fidelity.items():
            if name not in ("task", "general"):
                what = f"cosine of {name}, {q['how']} {to.replace('_', ' ')}, held-out"
                table.add_row(what, "1" if to == "to_dense" else "", f"{f['cosine']:.4f}", "")
        task = fidelity.get("task", {})
        for what in ("loss", "accuracy", "perplexity"):
            if to == "to_dense" and f"dense_{what}" in task:
                before, after = (f"{task[f'{which}_{what}']:.4f}" for which in ("dense", "pruned"))
                table.add_row(f"{what}, {q['how']}, held-out", before, after, "")


def _quantization(console: Console, q: Mapping[str, Any]) -> None:
    """What was quantized, and what was not."""
    done = ", ".join(f"{n} {what}" for what, n in q.items() if isinstance(n, int))
    console.print(f"quantized ({q['how']}): {done}", highlight=False, soft_wrap=True)
    for x in q["kept"]:
        console.print(f"  float32: {plain(x['what'])} {x['shape']}: {plain(x['why'])}", highlight=False, soft_wrap=True)


def front(console: Console, r: Mapping[str, Any]) -> None:
    """The points of an exploration, the front and its knee marked."""
    reached = [p for p in r["points"] if p["why"] is None]
    dense = next(p for p in reached if p["name"] == "dense")
    clock = "cpu_ms" if r["at"].get("threads", 1) == 1 else "wall_ms"
    columns: dict[str, list[str]] = {
        r["quality"]["name"]: [f"{p['quality']:.4f}" for p in reached],
        "predicted ms": ["" if p["predicted_ms"] is None else f"{p['predicted_ms']:.3g}" for p in reached],
        "measured ms": ["" if p["measured"] is None else f"{p['measured'][clock]:.2f}" for p in reached],
        "MACs": [f"{p['macs'] / dense['macs']:.1%}" if dense["macs"] else "" for p in reached],
        "parameters": [f"{p['parameters']:,}" for p in reached],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    table = Table(title=plain(r["title"]), title_justify="left")
    table.add_column("", no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right")
    table.add_column("", no_wrap=True)
    for i, p in enumerate(reached):
        mark = "[bold red]knee[/]" if p["name"] == r["knee"] else "front" if p["name"] in r["front"] else ""
        table.add_row(plain(p["name"]), *(cells[i] for cells in columns.values()), mark)
    console.print(table)
    for p in r["points"]:
        if p["why"] is not None:
            console.print(f"[yellow]{plain(p['name'])}:[/] {plain(p['why'])}", highlight=False, soft_wrap=True)
    notes = [*r["notes"], *(f"{p['name']}: {note}" for p in r["points"] for note in p["notes"])]
    if r["latency"]["status"] == "not run":
        notes.append(f"not measured: {r['latency']['why']}")
    for note in notes:
        console.print(f"[yellow]note:[/] {plain(note)}", highlight=False, soft_wrap=True)


def rungs(console: Console, rows: Sequence[Rung]) -> None:
    """The verification ladder."""
    table = Table("rung", "status", "figure", "limit", "", title="verification", title_justify="left")
    for r in rows:
        table.add_row(
            plain(r.name),
            STATUS[r.status],
            "" if r.figure is None else f"{r.figure:.1e}",
            "" if r.limit is None else f"{r.limit:.0e}",
            plain(r.detail),
        )
    console.print(table)


def manifest(console: Console, m: Manifest) -> None:
    """What the manifest says."""
    console.print(
        f"[bold]{plain(m.model)}[/] for {m.target}, runtime {m.runtime}, compiled {m.created}", highlight=False
    )
    if m.quantize is not None:
        console.print(f"  quantized: {plain(m.quantize)}", highlight=False)
    for title, specs in (("input", m.inputs), ("output", m.outputs)):
        for spec in specs:
            console.print(f"  {title:6} {plain(str(spec))}", highlight=False)
    for name, limits in m.dims.items():
        console.print(f"  size   {name}: {limits.min} to {limits.max or 'any'}", highlight=False)
    for name, entry in m.files.items():
        console.print(f"  file   {entry.bytes:>12,}  {entry.sha256[:12]}  {plain(name)}", highlight=False)


def bench(console: Console, r: Mapping[str, Any]) -> None:
    """A table for every point of the grid, one of memory and size, and what was not run."""
    for point, rows in grid_points(r["timings"]).items():
        unit = rows[0]["unit"]
        table = Table(title=f"{title_of(point)} counts", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", overflow="fold", min_width=20)
        for name in ("CPU ms", "p95", "wall ms", "p95", f"{unit}/s", "error", "ratio"):
            table.add_column(name, justify="right")
        for row in rows:
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            if row["status"] == "differs":
                table.add_row(plain(row["contender"]), "", "", "", "", "", f"[bold red]{error}[/]", "not timed")
                continue
            table.add_row(
                plain(row["contender"]),
                *(f"{row[name]:.2f}" for name in ("cpu_ms", "cpu_p95_ms", "wall_ms", "p95_ms")),
                f"{row['per_second']:,.0f}" if row["per_second"] is not None else "",
                error,
                f"{row['times_first']:.3f}" if row["times_first"] is not None else "",
            )
        console.print(table)
    table = Table("", title="size and memory", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("files, MB", "peak memory, MB"):
        table.add_column(name, justify="right")
    for one in r["contenders"]:
        peak = one["peak_memory_bytes"]
        table.add_row(plain(one["name"]), f"{one['bytes'] / 1e6:.1f}", "" if peak is None else f"{peak / 1e6:.0f}")
    console.print(table)
    for row in r["timings"]:
        if row["status"] == "differs":
            limit = next(c["limit"] for c in r["contenders"] if c["name"] == row["contender"])
            at = title_of((row["batch"], row["sequence"], row["threads"])).partition(":")[0]
            console.print(
                f"[bold red]differs:[/] {plain(row['contender'])} is {row['error']:.1e} away from torch eager at {at}, more "
                f"than {limit:.0e}: it computes something else and was not timed",
                highlight=False,
                soft_wrap=True,
            )
    for one in r["not_run"]:
        console.print(f"[yellow]not run:[/] {plain(one['contender'])}: {plain(one['why'])}", highlight=False, soft_wrap=True)
    for note in r["notes"]:
        console.print(f"[yellow]note:[/] {plain(note)}", highlight=False, soft_wrap=True)


def tiles(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """What `tilecut tune` measured: one line a direction and width."""
    table = Table("arch", "direction", "type", "width", "table's tile", "ms", "fastest tile", "ms", "ran", "refused")
    for r in rows:
        table.add_row(
            r["arch"],
            r["direction"],
            r["dtype"],
            str(r["width"]),
            "x".join(map(str, r["before"])),
            f"{r['before_ms']:.3f}",
            "x".join(map(str, r["best"])) if r["better"] else "the same",
            f"{r['best_ms']:.3f}",
            str(r["ran"]),
            str(r["refused"]),
        )
    console.print(table)


def results(console: Console, outputs: Mapping[str, np.ndarray]) -> None:
    """Shape and first values of every output."""
    for name, value in outputs.items():
        console.print(f"{plain(name)}: {value.dtype} {list(value.shape)}", highlight=False)
        console.print(plain(np.array2string(value, precision=4, threshold=12, edgeitems=3)), highlight=False)


def targets(console: Console, rows: Mapping[str, str]) -> None:
    """Targets and their lattices."""
    table = Table("target", "legal shapes")
    for name, lattice in rows.items():
        table.add_row(name, lattice)
    console.print(table)


def toolchains(console: Console, found: Sequence[Any]) -> None:
    """Private environments: what is in them, and how large they are."""
    table = Table("toolchain", "MB", "versions", "")
    for one in found:
        versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
        table.add_row(plain(one.name), f"{one.bytes / 1e6:,.0f}", plain(versions), "" if one.current else "of older pins")
    console.print(table)
    for one in found:
        console.print(f"{one.name}: {one.folder}", markup=False, highlight=False, soft_wrap=True)
