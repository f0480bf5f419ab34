"""`compile_pruned`: the compiler, from a PyTorch model to a verified artifact, one visible stage after another."""

from __future__ import annotations

import datetime
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tilecut.artifact import MODULE, PLAN, Artifact
from tilecut.check_lowered import check_lowered
from tilecut.config import AT, PruneConfig, find_config
from tilecut.copy_companions import copy_companions
from tilecut.cut_model import CutModel, cut_model
from tilecut.describe_machine import tool_versions
from tilecut.make_cases import make_cases, make_inputs
from tilecut.make_step_cases import make_step_cases
from tilecut.measure_fidelity import measure_fidelity
from tilecut.measure_latency import measure_latency
from tilecut.measure_quantized import measure_quantized
from tilecut.plan_generation import check_generation, plan_generation, signature_of
from tilecut.prepare import Prepared, prepare
from tilecut.progress import Progress
from tilecut.report import build_report, write_report
from tilecut.write_artifact import artifact_folder, check_output
from tilecut.write_weights import write_weights
from tilecut_passes.example_inputs import DynamicDims
from tilecut_passes.graph import Graph
from tilecut_passes.prune import as_cut
from tilecut_passes.run_passes import Pass, run_passes
from tilecut_runtime.errors import ConfigError, VerificationError
from tilecut_runtime.manifest import DimRange, Manifest, Signature, list_files
from tilecut_runtime.reference import ENCODER, Case, write_cases
from tilecut_runtime.torch_program import WEIGHTS, save_program, tensors_of
from tilecut_targets.export_program import export_program
from tilecut_targets.find_target import find_target
from tilecut_targets.target import Target


def compile_pruned(
    model: nn.Module | str | Path,
    target: str | Target = "edge",
    example_inputs: Any = None,
    calibration: Any = None,
    config: str | PruneConfig | None = "hybrid",
    output: str | Path | None = None,
    *,
    dynamic_shapes: DynamicDims | None = None,
    passes: Sequence[Pass] = (),
    generate: bool = False,
    max_length: int | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> Artifact:
    """Prune, legalize, fuse, lower and emit a model, and verify what was emitted.

    Args:
        model: an nn.Module, or the folder of a Hugging Face model. It is not changed.
        target: "edge" ("edge:<runtime>" picks another than onnxruntime), "cuda", "ascend" ("ascend:<chip>" picks one), or a
            Target.
        example_inputs: a tensor, a tuple in forward's order or a dict by name; None makes them from a Hugging Face
            model's config.
        calibration: an iterable of batches (dicts, `labels` optional) or of texts, or a .txt, .tsv or .jsonl path; None
            takes general text when a tokenizer lies beside the model, else magnitude scores and no refit.
        config: "edge", "cloud", "hybrid", a PruneConfig, or None to compile the dense model.
        output: the artifact's folder; default "<model>-<target>". An artifact that is there is replaced.
        dynamic_shapes: input name -> dimension -> name of the dynamic size; None guesses.
        passes: passes of your own, run on the legal graph before fusion.
        generate: a decoder with a key-value cache, for `Session.generate` (docs/generation.md).
        max_length: how many tokens a text may have then, the prompt's included; None: as many as the model has positions.
        measure: measure latency against the dense model (targets that run here).
        progress: told of stages and steps.

    Raises:
        TilecutError: a subclass says what, where, got, wanted and what to do; no output is left behind.
    """
    if progress is not None and not isinstance(progress, Progress):
        raise ConfigError("compile_pruned", "progress is no Progress", got=type(progress).__name__)
    if not isinstance(passes, Sequence) or not all(callable(one) for one in passes):
        raise ConfigError(
            "compile_pruned", "passes is no sequence of passes", got=repr(passes)[:60], wanted="e.g. [MyPass()]"
        )
    progress = progress or Progress()
    chosen_config = find_config(config)
    chosen_target = find_target(target).quantized(chosen_config.quantize if chosen_config is not None else None)
    check_generation(generate, max_length, chosen_target)
    path = check_output(default_output(model, chosen_target) if output is None else output)
    made = prepare(model, chosen_target, example_inputs, calibration, chosen_config, dynamic_shapes, progress)
    cut = cut_model(made, chosen_config, progress)
    return emit(made, cut, chosen_config, path, passes, measure, progress, generate, max_length)


def emit(
    made: Prepared,
    cut: CutModel,
    config: PruneConfig | None,
    path: Path,
    passes: Sequence[Pass],
    measure: bool,
    progress: Progress,
    generate: bool = False,
    max_length: int | None = None,
) -> Artifact:
    """Legalize, fuse, lower and write a cut model, verify what was written, and report.

    Raises:
        LoweringError: `generate`, and the model is no decoder that a cache can stand for.
        VerificationError: the written files do not give what the pruned model gives; nothing is left behind.
    """
    target, pruned, plan = made.target, cut.graph, cut.choice.plan
    made = made.of_plan(plan)
    records, rungs = list(cut.records), list(cut.rungs)
    with progress.stage("legalize"):
        powers = config.power_of_two_heads if config else None
        records += run_passes(pruned, [*target.enforce(powers), *passes])
    # The module keeps the model's own sizes.
    served = replace(pruned, ranges=target.ranges(pruned, plan.at))
    if target.exported:
        for name, least in cut.shortest.items():
            held = served.ranges.get(name, DimRange())
            served.ranges[name] = replace(held, min=max(held.min, least))
    with progress.stage("fuse"):
        fused = pruned.copy()
        records += run_passes(fused, target.fusing, check=make_inputs(pruned, 2, 9, seed=1, ragged=False))
        fused.ranges = served.ranges
    layout, encoder = None, None
    if generate:
        with progress.stage("cache"):
            generation = plan_generation(fused, target, made.model, max_length)
            records += generation.records
            served = fused = generation.steps
            layout, encoder = generation.layout, generation.encoder
    with progress.stage("choose forms"):
        kept = (config or PruneConfig()).cache_folder
        sizes = {**AT, **plan.at}
        before = None if encoder is None else target.decided(encoder, sizes, measure, kept, progress.step)
        target = target.decided(fused, sizes, measure, kept, progress.step)
    with progress.stage("lower"):
        lowered = fused.copy()
        records += run_passes(lowered, target.lowering)

    with artifact_folder(path) as folder:
        with progress.stage("write"):
            written = target.write(fused, lowered, folder)
            if encoder is not None and before is not None:
                first = encoder.copy()
                records += run_passes(first, before.lowering)
                beside = before.write_encoder(first, folder)
                written.entry |= beside.entry
                written.facts |= beside.facts
            _write_module(pruned, folder)
            plan.write(folder / PLAN)
            copy_companions(made.model, folder)
            seed = config.seed if config else 0
            read: list[Case] = []
            if layout is None:
                cases = make_cases(served, seed=seed)
            else:
                cases, read, steps = make_step_cases(pruned, served, encoder, layout, seed)
                rungs.append(steps)
                if encoder is not None:
                    write_cases(read, folder, ENCODER)
            write_cases(cases, folder)
        if target.quantize is not None:
            with progress.stage("quantize"):
                cut_inputs = as_cut(made.dense, plan)
                batches = [replace(batch, inputs=cut_inputs(batch.inputs)) for batch in made.fit]
                written.facts |= target.quantize_files(folder, batches)
        with progress.stage("verify"):
            deployed = signature_of(served, layout) if layout is not None else _signature(served)
            manifest = Manifest(
                str(target),
                target.runtime,
                made.name,
                written.entry,
                deployed.inputs,
                deployed.outputs,
                deployed.dims,
                deployed.returns,
                target.limit,
                tool_versions(),
                datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                quantize=target.quantize,
                generation=layout,
                module=None if layout is None else _signature(pruned),
                table_rows=deployed.table_rows,
                encoder=None if encoder is None else _signature(encoder),
                files=list_files(folder),
            )
            rungs += target.verify(folder, manifest, cases)
            if encoder is not None:
                rungs += target.verify_encoder(folder, manifest, read)
            if target.rounds and made.calibrated is not None:
                rungs.append(check_lowered(pruned, lowered, made.calibrated.held_out, target.tolerance))
            if failed := [r for r in rungs if r.status == "failed"]:
                raise VerificationError(
                    failed[0].name,
                    failed[0].detail,
                    got=f"{failed[0].figure:.2e}",
                    wanted=f"at most {failed[0].limit:.0e}",
                    fix="the artifact was not written; " + _remedy(target),
                )
        fidelity: dict[str, Any] = {}
        if made.calibrated is not None:
            with progress.stage("fidelity"):
                held_out, general = made.calibrated.held_out, made.calibrated.general
                fidelity = measure_fidelity(made.dense, pruned, held_out, as_cut(made.dense, plan), general)
                if target.quantize is not None:
                    record = written.facts["quantization"]
                    assert isinstance(record, dict)
                    record["fidelity"] = measure_quantized(made, pruned, plan, folder, manifest)
        latency: dict[str, Any] = {"status": "not measured"}
        if measure:
            with progress.stage("latency"), tempfile.TemporaryDirectory() as scratch:
                latency = measure_latency(target, made.original, pruned, folder, manifest, plan.at, Path(scratch), progress.step)
        report = build_report(
            manifest,
            made,
            cut,
            config,
            fidelity,
            latency,
            rungs,
            records,
            written.facts,
            [*fused.refusals, *lowered.refusals[len(fused.refusals) :]],
            progress.seconds,
            folder,
        )
        write_report(report, folder)
        manifest.verification = tuple(rungs)
        manifest.files = list_files(folder)
        manifest.write(folder)
    return Artifact(path)


def default_output(model: Any, target: Target) -> str:
    """<model>-<target>, and -<quantization> where there is one."""
    name = Path(model).resolve().name if isinstance(model, str | Path) else type(model).__name__
    what = str(target) if target.quantize is None else f"{target}-{target.quantize}"
    return f"{name}-{re.sub(r'[^A-Za-z0-9]+', '-', what)}".lower()


def _remedy(target: Target) -> str:
    """What to do when the written files are not what they should be."""
    if target.quantize is not None:
        return "quantize less: 'int8' loses less than 'int4', 'fp16' least"
    return "compute in bf16 or float32" if target.rounds else "please report the model"


def _signature(pruned: Graph) -> Signature:
    return Signature(
        pruned.input_specs(), pruned.output_specs(), dict(pruned.ranges), pruned.returns, pruned.table_rows()
    )


def _write_module(pruned: Graph, folder: Path) -> None:
    """The pruned model for PyTorch: its graph without weights, and its weights once."""
    program = export_program(pruned)
    save_program(program, folder / MODULE)
    write_weights(tensors_of(program), folder / WEIGHTS, metadata={"format": "pt"})
