"""`explore`: many budgets of one model, from one preparation, and the front of what they cost and how good they are.

The model is captured, calibrated, ranked and priced once (`prepare.py`); every budget is then cut, repaired and compared
with the dense model on held-out data. Nothing is written but the front, unless the artifacts are asked for.
"""

from __future__ import annotations

import datetime
import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tilecut.artifact import Artifact
from tilecut.compile import default_output
from tilecut.compile import emit as emit_cut
from tilecut.config import PruneConfig, find_config
from tilecut.cut_model import cut_model
from tilecut.describe_machine import machine, tool_versions
from tilecut.draw_front import check_matplotlib, draw_front
from tilecut.exploration import FORMAT, FRONT, PAGE, PICTURE, Exploration, check_exploration
from tilecut.find_front import KNEE_METHOD
from tilecut.join_processes import join_processes, launched
from tilecut.judge_points import DENSE, QUALITIES, Point, choose_cost, choose_quality, judge
from tilecut.make_cases import make_inputs
from tilecut.measure_fidelity import measure_fidelity
from tilecut.measure_latency import ROUNDS, WARMUP
from tilecut.prepare import Prepared, prepare
from tilecut.progress import Progress
from tilecut.report import calibration_facts, render_page, weight_bytes
from tilecut.write_artifact import artifact_folder, check_output
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.count_macs import MacCounter, count_parameters
from tilecut_passes.example_inputs import DynamicDims
from tilecut_passes.prune import as_cut
from tilecut_passes.run_passes import run_passes
from tilecut_passes.share_batches import agreed, process
from tilecut_runtime.errors import ArtifactError, CalibrationError, ConfigError
from tilecut_runtime.session import load
from tilecut_runtime.timing import settle_of, time_interleaved
from tilecut_targets.cost_model import CALCULATED, clock
from tilecut_targets.find_target import find_target
from tilecut_targets.target import Target

SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def explore(
    model: nn.Module | str | Path,
    target: str | Target = "edge",
    example_inputs: Any = None,
    calibration: Any = None,
    config: str | PruneConfig = "hybrid",
    output: str | Path | None = None,
    *,
    sparsities: Sequence[float] | None = None,
    latencies_ms: Sequence[float] | None = None,
    quality: str | None = None,
    dynamic_shapes: DynamicDims | None = None,
    emit: bool = False,
    measure: bool = False,
    progress: Progress | None = None,
) -> Exploration:
    """Cut a model to many budgets and write the front of quality and latency: explore.json, .png and .html.

    Args:
        model, target, example_inputs, calibration, dynamic_shapes, progress: as in `compile_pruned`.
        config: all that the budgets share; what it says of sparsity and milliseconds gives way to them, its other budgets
            hold at every point.
        output: a folder; default "<model>-<target>-explore". An exploration that is there is replaced.
        sparsities: the budgets, each a `PruneConfig.sparsity`; default 0.2, 0.3, .. 0.8.
        latencies_ms: budgets in milliseconds instead, each a `PruneConfig.max_latency_ms`.
        quality: "cosine", "accuracy", "perplexity", "loss" or "kl"; None takes what the model and the data have.
        emit: write an artifact of every point, and of the dense model, into the folder.
        measure: time those artifacts, interleaved; turns `emit` on.

    Raises:
        TilecutError: a subclass says what cannot be done; nothing is left behind. A budget that no legal model meets is
            no error but a point with its reason, unless none can be met.
    """
    base = find_config(config)
    chosen = find_target(target).quantized(base.quantize if base is not None else None)
    if base is None:
        raise ConfigError("explore", "config=None cuts nothing", wanted="a preset or a PruneConfig")
    if quality is not None and quality not in QUALITIES:
        raise ConfigError("explore", "unknown quality", got=repr(quality), wanted=", ".join(QUALITIES))
    check_matplotlib("explore")
    configs = _configs(base, sparsities, latencies_ms)
    path = check_output(f"{default_output(model, chosen)}-explore" if output is None else output, check_exploration)
    progress = progress or Progress()
    if launched():
        join_processes(cpu=base.finetune is not None and base.finetune.device == "cpu")
    first = next(iter(configs.values()))
    made = prepare(model, chosen, example_inputs, calibration, first, dynamic_shapes, progress, latency=True)
    if made.calibrated is None:
        raise CalibrationError("explore", "no data to compare the models on", fix="pass calibration=")
    # One process of several writes; all cut.
    with artifact_folder(path, check_exploration) if process()[0] == 0 else nullcontext() as folder:
        points = _sweep(made, configs, folder, emit or measure, progress)
        if folder is not None:
            latency = _measure(made, points, folder, first.sizes(), progress) if measure else {"status": "not measured"}
            report = _report(made, points, base, quality, latency, progress)
            picture = draw_front(report)
            (folder / PICTURE).write_bytes(picture)
            page = render_page("explore.html.j2", r=report, picture=b64encode(picture).decode())
            (folder / PAGE).write_text(page, encoding="utf-8")
            (folder / FRONT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    # The other processes return when the folder is there.
    agreed(None)
    return Exploration(path)


def _configs(
    base: PruneConfig, sparsities: Sequence[float] | None, latencies_ms: Sequence[float] | None
) -> dict[str, PruneConfig]:
    """The config of every point by its name."""
    if sparsities is not None and latencies_ms is not None:
        raise ConfigError("explore", "sparsities and latencies_ms are given", wanted="one of them")
    if latencies_ms is not None:
        named = {f"latency-{ms:g}ms": {"max_latency_ms": ms, "sparsity": None} for ms in latencies_ms}
    else:
        asked = SPARSITIES if sparsities is None else sparsities
        named = {f"sparsity-{s:g}": {"sparsity": s, "max_latency_ms": None} for s in asked}
    if not named:
        raise ConfigError("explore", "there is no budget to explore")
    return {name: PruneConfig(**{**base.model_dump(), **budget}) for name, budget in named.items()}


def _sweep(
    made: Prepared, configs: Mapping[str, PruneConfig], folder: Path | None, emit: bool, progress: Progress
) -> list[Point]:
    """The dense model, then every budget. `folder` is None on a process that writes nothing."""
    points: list[Point] = []
    with progress.stage("sweep"):
        for done, (name, config) in enumerate(configs.items()):
            points.append(_point(made, name, config, folder, emit, progress))
            progress.step(done + 1, len(configs) + 1)
        reached = [p for p in points if p.why is None]
        if not reached:
            raise ConfigError("explore", f"none of {len(points)} budgets can be met", got=f"of {points[0].name}: {points[0].why}")
        points.insert(0, _dense(made, next(iter(configs.values())), folder, emit, progress))
        progress.step(len(configs) + 1, len(configs) + 1)
    return points


def _point(
    made: Prepared, name: str, config: PruneConfig, folder: Path | None, emit: bool, progress: Progress
) -> Point:
    budget = {k: v for k in ("sparsity", "max_latency_ms") if (v := getattr(config, k)) is not None}
    # Stages of one point are too short for a bar each.
    inner = Progress(seconds=dict(progress.seconds))
    before = sum(inner.seconds.values())
    try:
        cut = cut_model(made, config, inner)
    except ConfigError as e:
        return Point(name, budget, why=str(e))
    point = Point(
        name,
        budget,
        macs=cut.choice.macs()["pruned"],
        kept={g.name: g.count for g in cut.choice.plan.groups},
        predicted_loss=cut.choice.loss,
        predicted_ms=cut.choice.latency_ms[1] if cut.choice.latency_ms else None,
        notes=list(cut.notes),
    )
    if folder is not None:
        assert made.calibrated is not None
        if emit:
            emit_cut(made, cut, config, folder / name, (), False, inner)
            point.artifact, point.fidelity = name, Artifact(folder / name).report["fidelity"]
        else:
            run_passes(cut.graph, made.target.enforce(config.power_of_two_heads))
            held_out, general = made.calibrated.held_out, made.calibrated.general
            with inner.stage("fidelity"):
                dense = made.of_plan(cut.choice.plan).dense
                changed = as_cut(dense, cut.choice.plan)
                point.fidelity = measure_fidelity(dense, cut.graph, held_out, changed, general)
        point.parameters, point.bytes = count_parameters(cut.graph), weight_bytes(cut.graph)
    point.seconds = round(sum(inner.seconds.values()) - before, 2)
    return point


def _dense(made: Prepared, config: PruneConfig, folder: Path | None, emit: bool, progress: Progress) -> Point:
    """The dense model as a point: what every other one is compared with."""
    lattice = made.target.lattice(config.block, config.power_of_two_heads)
    kept = {g.name: lattice.emitted(g.kind, g.size) for g in made.groups}
    point = Point(
        DENSE,
        {},
        macs=MacCounter(made.axes, find_groups(made.axes), config.sizes()).total(),
        parameters=count_parameters(made.original),
        bytes=weight_bytes(made.original),
        kept=kept,
        predicted_loss=0.0,
        predicted_ms=made.latency.total(kept) if made.latency is not None else None,
    )
    if folder is not None:
        assert made.calibrated is not None
        held_out, general = made.calibrated.held_out, made.calibrated.general
        point.fidelity = measure_fidelity(made.dense, made.dense, held_out, general=general)
        if emit:
            inner = Progress(seconds=dict(progress.seconds))
            emit_cut(made, cut_model(made, None, inner), None, folder / DENSE, (), False, inner)
            point.artifact = DENSE
    return point


def _measure(
    made: Prepared, points: Sequence[Point], folder: Path, at: Mapping[str, int], progress: Progress
) -> dict[str, Any]:
    """Time the artifacts side by side and fill in `measured`; a device that is not here is said, never guessed."""
    threads = at["threads"]
    inputs = make_inputs(made.dense, at["batch"], at["sequence"], seed=5, ragged=False)
    runs: dict[str, Callable[[], object]] = {}
    emitted = [p for p in points if p.artifact is not None]
    for p in emitted:
        try:
            session = load(folder / p.name, threads=threads)
        except ArtifactError as e:
            return {"status": "not run", "why": str(e).replace(str(folder / p.name), p.name)}
        plan = Artifact(folder / p.name).plan
        own = as_cut(made.of_plan(plan).dense, plan)(inputs)
        arrays: dict[str, np.ndarray] = {name: value.numpy() for name, value in own.items()}
        runs[p.name] = lambda session=session, arrays=arrays: session.run(arrays)
    with progress.stage("latency"):
        timings = time_interleaved(runs, ROUNDS, WARMUP, progress.step, settle=settle_of(threads))
    for p in emitted:
        t = timings[p.name]
        p.measured = {"cpu_ms": round(t.cpu_ms, 3), "wall_ms": round(t.wall_ms, 3), "p95_ms": round(t.p95_ms, 3)}
    return {"status": "measured", "clock": clock(threads), "rounds": ROUNDS}


def _report(
    made: Prepared,
    points: Sequence[Point],
    base: PruneConfig,
    quality: str | None,
    latency: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """explore.json as plain data."""
    at, calibrated = base.sizes(), made.calibrated
    assert calibrated is not None
    threads = at["threads"]
    calculated = made.latency is not None and made.latency.facts.get("clock") == CALCULATED
    cost = choose_cost(points, threads, str(made.target), calculated)
    by = choose_quality(quality, points[0].fidelity)
    front, knee = judge(points, cost["name"], by, threads)
    label = QUALITIES[by].label
    why = f" ({cost['why']})" if cost["why"] else ""
    return {
        "format": FORMAT,
        "title": f"{made.name} for {made.target}: {label} against {cost['label']}{why}",
        "model": made.name,
        "target": str(made.target),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": base.model_dump(mode="json"),
        "method": made.method,
        "table": {"measured": made.table.measured, "held": made.table.held} if made.table else None,
        "lattice": made.target.lattice(base.block, base.power_of_two_heads).describe(),
        "at": at,
        "cost": cost,
        "quality": {"name": by, "label": label, "better": QUALITIES[by].better},
        "calibration": calibration_facts(calibrated),
        "points": [asdict(p) for p in points],
        "front": front,
        "knee": knee,
        "knee_method": KNEE_METHOD,
        "latency": latency,
        "cost_model": made.latency.as_json() if made.latency else None,
        "notes": [*made.notes, *calibrated.notes],
        "seconds": {k: round(v, 2) for k, v in progress.seconds.items()},
        "machine": machine(),
        "tools": tool_versions(),
    }
