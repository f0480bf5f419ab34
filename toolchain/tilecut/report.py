"""The report: everything that a compile found out, as `report.json` for machines and `report.html` for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tilecut.artifact import REPORT, REPORT_PAGE
from tilecut.config import PruneConfig
from tilecut.cut_model import CutModel
from tilecut.describe_machine import machine
from tilecut.load_calibration import Calibration
from tilecut.measure_memory import peak_bytes
from tilecut.prepare import Prepared
from tilecut_passes.count_macs import count_parameters
from tilecut_passes.graph import Graph, Refusal
from tilecut_passes.run_passes import PassRecord
from tilecut_runtime.manifest import Manifest, Rung


def build_report(
    manifest: Manifest,
    made: Prepared,
    cut: CutModel,
    config: PruneConfig | None,
    fidelity: dict[str, Any],
    latency: dict[str, Any],
    rungs: Sequence[Rung],
    records: Sequence[PassRecord],
    facts: dict[str, Any],
    refusals: Sequence[Refusal],
    seconds: dict[str, float],
    folder: Path,
) -> dict[str, Any]:
    """The report as plain data."""
    dense, pruned, choice, calibration = made.original, cut.graph, cut.choice, made.calibrated
    macs = choice.macs()
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    deployed = set(manifest.entry.values()) | {
        name for name in files if any(name.startswith(f"{entry}.") for entry in manifest.entry.values())
    }
    return {
        "model": manifest.model,
        "target": manifest.target,
        "created": manifest.created,
        "config": config.model_dump(mode="json") if config else None,
        "method": made.method,
        "table": {"measured": made.table.measured, "held": made.table.held} if made.table else None,
        "predicted_loss": choice.loss,
        "block": choice.block,
        "lattice": choice.lattice.describe(),
        "at": choice.plan.at,
        "macs": macs,
        "kinds": choice.by_kind(),
        "parameters": {"dense": count_parameters(dense), "pruned": count_parameters(pruned)},
        "bytes": {
            "dense_weights": weight_bytes(dense),
            "pruned_weights": weight_bytes(pruned),
            "deployed": sum(files[name] for name in deployed),
            "files": files,
        },
        "groups": [
            {"name": g.name, "kind": g.kind, "size": g.size, "kept": len(g.kept), "padded_to": g.padded_to}
            for g in choice.plan.groups
        ],
        "tokens": choice.tokens(),
        "frozen": [asdict(f) for f in choice.plan.frozen],
        "calibration": calibration_facts(calibration) if calibration else None,
        "fidelity": fidelity,
        "recovery": cut.recovery,
        "latency": latency,
        "predicted_ms": dict(zip(("dense", "pruned"), choice.latency_ms)) if choice.latency_ms else None,
        "cost_model": made.latency.as_json() if made.latency else None,
        "verification": [asdict(r) for r in rungs],
        "passes": [{"name": r.name, "rewrites": r.rewrites, "seconds": round(r.seconds, 3)} for r in records],
        "refusals": [asdict(r) for r in refusals],
        "quantization": facts.get("quantization"),
        "emitted": {name: fact for name, fact in facts.items() if name != "quantization"},
        "notes": [*made.notes, *(calibration.notes if calibration else ()), *cut.notes],
        # The most of the process so far; pages of mapped files count.
        "peak_memory_bytes": peak_bytes(),
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "machine": machine(),
        "tools": manifest.tools,
    }


def calibration_facts(calibration: Calibration) -> dict[str, Any]:
    """What was fitted and what was held out."""
    return {
        "source": calibration.source,
        "tokens": calibration.tokens,
        "batches": len(calibration.fit),
        "held_out": len(calibration.held_out),
        "general": len(calibration.general),
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json and the self-contained report.html."""
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = render_page("report.html.j2", r=report, layers=kept_per_layer(report["groups"]))
    (folder / REPORT_PAGE).write_text(page, encoding="utf-8")


def render_page(template: str, **values: Any) -> str:
    """A page from one of the package's templates."""
    environment = Environment(
        loader=PackageLoader("tilecut", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = human_count
    environment.filters["size"] = human_bytes
    return environment.get_template(template).render(**values)


def kept_per_layer(groups: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Groups by kind, each with the fraction that stayed, for the picture."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        kinds.setdefault(group["kind"], []).append({**group, "fraction": group["kept"] / group["size"]})
    return kinds


def weight_bytes(graph: Graph) -> int:
    """Bytes of the tensors that the graph reads."""
    return sum(t.numel() * t.element_size() for t in graph.tensors.values())


def human_count(number: float) -> str:
    """1.43 G, 717 M, 384: three significant digits."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.{2 - min(2, len(str(int(number / limit))) - 1)}f} {unit}"
    return f"{number:.0f}"


def human_bytes(number: float) -> str:
    """90.8 MB, 12 kB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} B"
