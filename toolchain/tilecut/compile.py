"""`compile_pruned`: the compiler, from a PyTorch model to a verified artifact, one visible stage after another."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tilecut.artifact import MODULE, PLAN, Artifact
from tilecut.check_sizes import check_sizes
from tilecut.choose_plan import choose_plan, keep_everything
from tilecut.config import PruneConfig, find_config
from tilecut.copy_companions import copy_companions
from tilecut.load_calibration import Calibration, load_calibration
from tilecut.make_cases import make_cases, make_inputs
from tilecut.measure_fidelity import measure_fidelity
from tilecut.measure_latency import measure_latency
from tilecut.progress import Progress
from tilecut.report import build_report, write_report
from tilecut.write_artifact import artifact_folder, check_output
from tilecut_passes.axes.groups import Group, find_frozen, find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.example_inputs import DynamicDims
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph
from tilecut_passes.mask import Mask
from tilecut_passes.prune import Prune, as_cut
from tilecut_passes.reconstruct import Reconstruct
from tilecut_passes.run_passes import Pass, PassRecord, largest_error, run_passes
from tilecut_passes.score import IMPORTANCES, score
from tilecut_runtime.errors import CaptureError, ConfigError, VerificationError, first_line
from tilecut_runtime.manifest import Manifest, Rung, list_files
from tilecut_runtime.reference import write_cases
from tilecut_runtime.torch_program import WEIGHTS, save_program, tensors_of
from tilecut_targets.export_program import export_program
from tilecut_targets.find_target import find_target
from tilecut_targets.target import Target, rung

log = logging.getLogger("tilecut.compile")

# How far the cut graph may differ from the masked dense one, relative to the output's magnitude (float32).
CUT_TOLERANCE = 1e-5
CUT_SHAPES = ((2, 9), (3, 37))


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
    measure: bool = True,
    progress: Progress | None = None,
) -> Artifact:
    """Prune, legalize, fuse, lower and emit a model, and verify what was emitted.

    Args:
        model: an nn.Module, or the folder of a Hugging Face model. It is not changed.
        target: "edge", "cuda", "ascend" ("ascend:<chip>" picks one), or a Target.
        example_inputs: a tensor, a tuple in forward's order or a dict by name; None makes them from a Hugging Face
            model's config.
        calibration: an iterable of batches (dicts, `labels` optional) or of texts, or a .txt, .tsv or .jsonl path; None
            takes general text when a tokenizer lies beside the model, else magnitude scores and no refit.
        config: "edge", "cloud", "hybrid", a PruneConfig, or None to compile the dense model.
        output: the artifact's folder; default "<model>-<target>". An artifact that is there is replaced.
        dynamic_shapes: input name -> dimension -> name of the dynamic size; None guesses.
        passes: passes of your own, run on the legal graph before fusion.
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
    chosen_target, chosen_config = find_target(target), find_config(config)
    if isinstance(model, str | Path):
        model = load_model(Path(model))
    if not isinstance(model, nn.Module):
        raise CaptureError(
            "compile_pruned", "not a PyTorch model", got=type(model).__name__, wanted="an nn.Module or a model folder"
        )
    default = f"{type(model).__name__}-{re.sub(r'[^A-Za-z0-9]+', '-', str(chosen_target))}".lower()
    path = check_output(default if output is None else output)

    with progress.stage("capture"):
        dense = capture(model, example_inputs, dynamic_shapes)
        _check_dtype(dense, type(model).__name__)
        check_sizes(dense, type(model).__name__)
        _check_at(dense, chosen_config)
    with progress.stage("axes"):
        axes = infer(dense)
        every_group = find_groups(axes)
    notes = list(dense.notes)
    records: list[PassRecord] = []
    rungs: list[Rung] = []
    calibrated: Calibration | None = None
    method = None

    if chosen_config is None:
        choice = keep_everything(
            dense, axes, [g for g in every_group if g.kind in PruneConfig().kinds], PruneConfig().sizes(), chosen_target
        )
    else:
        groups = _prunable(every_group, chosen_config, type(model).__name__, find_frozen(axes))
        with progress.stage("calibration"):
            calibrated = load_calibration(
                calibration, dense, model, chosen_config.sizes()["sequence"], chosen_config.seed
            )
        method, note = _method(chosen_config, calibrated)
        notes += note
        with progress.stage(f"score ({method})"):
            rankings = score(
                method, dense, groups, calibrated.fit if calibrated else [], chosen_config.seed, progress.step
            )
        with progress.stage("search"):
            choice = choose_plan(dense, axes, groups, rankings, chosen_config, chosen_target)

    powers = chosen_config.power_of_two_heads if chosen_config else None
    enforce = chosen_target.enforce(powers)
    with progress.stage("prune"):
        plan = choice.plan
        pruned = dense.copy()
        records += run_passes(pruned, [Prune(plan)])
        rungs.append(_cut_equals_masked(dense, pruned, plan))
    if chosen_config is not None and chosen_config.reconstruct and calibrated is not None:
        with progress.stage("reconstruct"):
            records += run_passes(pruned, [Reconstruct(dense, calibrated.fit, progress=progress.step)])
    with progress.stage("legalize"):
        records += run_passes(pruned, [*enforce, *passes])
    with progress.stage("fuse"):
        fused = pruned.copy()
        records += run_passes(fused, [FuseAttention()], check=make_inputs(pruned, 2, 9, seed=1, ragged=False))
    with progress.stage("lower"):
        lowered = fused.copy()
        records += run_passes(lowered, chosen_target.lowering)

    with artifact_folder(path) as folder:
        with progress.stage("write"):
            written = chosen_target.write(fused, lowered, folder)
            _write_module(pruned, folder)
            plan.write(folder / PLAN)
            copy_companions(model, folder)
            cases = make_cases(pruned, seed=chosen_config.seed if chosen_config else 0)
            write_cases(cases, folder)
            manifest = Manifest(
                str(chosen_target),
                chosen_target.runtime,
                type(model).__name__,
                written.entry,
                pruned.input_specs(),
                pruned.output_specs(),
                pruned.ranges,
                pruned.returns,
                chosen_target.tolerance,
                tool_versions(),
                datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                files=list_files(folder),
            )
        with progress.stage("verify"):
            rungs += chosen_target.verify(folder, manifest, cases)
            if failed := [r for r in rungs if r.status == "failed"]:
                raise VerificationError(
                    failed[0].name,
                    failed[0].detail,
                    got=f"{failed[0].figure:.2e}",
                    wanted=f"at most {failed[0].limit:.0e}",
                    fix="the artifact was not written; please report the model",
                )
        fidelity: dict[str, Any] = {}
        if calibrated is not None:
            with progress.stage("fidelity"):
                fidelity = measure_fidelity(dense, pruned, calibrated.held_out, as_cut(dense, plan))
        latency: dict[str, Any] = {"status": "not measured"}
        if measure:
            with progress.stage("latency"), tempfile.TemporaryDirectory() as scratch:
                latency = measure_latency(chosen_target, dense, folder, manifest, plan.at, Path(scratch), progress.step)
        report = build_report(
            manifest,
            dense,
            pruned,
            choice,
            chosen_config,
            method,
            calibrated,
            fidelity,
            latency,
            rungs,
            records,
            written.facts,
            notes,
            [*fused.refusals, *lowered.refusals[len(fused.refusals) :]],
            progress.seconds,
            folder,
        )
        write_report(report, folder)
        manifest.verification = tuple(rungs)
        manifest.files = list_files(folder)
        manifest.write(folder)
    return Artifact(path)


def load_model(folder: Path) -> nn.Module:
    """A Hugging Face model from its folder, as the class that its config names.

    Raises:
        CaptureError: no such folder, no config, a class that transformers lacks, or weights that are missing, damaged
            or of another shape.
    """
    if not os.path.isfile(folder / "config.json"):
        raise CaptureError(str(folder), "not the folder of a Hugging Face model: it holds no config.json")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder))
        names = config.architectures or ["AutoModel"]
        cls = getattr(transformers, names[0], None)
        if cls is None:
            raise CaptureError(str(folder), "transformers has no such model class", got=names[0])
        # It would only warn of what is missing, and make that up; the sizes are compared below, with their names.
        model, found = cls.from_pretrained(str(folder), output_loading_info=True, ignore_mismatched_sizes=True)
    except CaptureError:
        raise
    # A damaged config or weight file fails wherever transformers first trips over it.
    except Exception as e:
        raise CaptureError(str(folder), f"transformers cannot load it: {first_line(e)}") from e
    mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    for names, problem in (
        (found["missing_keys"], "weights are missing from the model's files"),
        (mismatched, "weights have another shape than the config says"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CaptureError(
                str(folder), problem, got=shown, fix="save the whole model under the class in its config"
            )
    return model


def tool_versions() -> dict[str, str]:
    """Versions of what took part."""
    names = ("tilecut", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy", "scipy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "tilecut":
                from tilecut import __version__

                found[name] = __version__
    return found


def _check_dtype(graph: Graph, model: str) -> None:
    """Weights are float32; what a target computes in is its own choice."""
    for name, tensor in graph.tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise CaptureError(
                f"{model}: {name}",
                "a weight is not float32",
                got=str(tensor.dtype).removeprefix("torch."),
                wanted="float32",
                fix="pass model.float()",
            )


def _check_at(graph: Graph, config: PruneConfig | None) -> None:
    """MACs are counted at sizes that the model has."""
    known = {*PruneConfig().sizes(), *graph.dims.values()}
    if unknown := [name for name in (config.at if config else {}) if name not in known]:
        raise ConfigError(
            "PruneConfig", f"at names no size of the model: {unknown[0]}", wanted=", ".join(sorted(known))
        )


def _prunable(groups: list[Group], config: PruneConfig, model: str, frozen: list) -> list[Group]:
    found = [g for g in groups if g.kind in config.kinds]
    if not found:
        reasons = "; ".join(f"{f.name}: {f.why}" for f in frozen[:3]) or "it has no contraction with a free dimension"
        raise ConfigError(
            model,
            f"nothing in this model can be cut ({', '.join(config.kinds)})",
            got=reasons,
            fix="ask for other kinds, or config=None for a dense compile",
        )
    return found


def _method(config: PruneConfig, calibration: Calibration | None) -> tuple[str, list[str]]:
    """The importance to use: what was asked for, or magnitude where there is no data.

    A method that needs labels was chosen with them in mind: it is not replaced, so that `score` says what is missing.
    """
    wanted = IMPORTANCES[config.method]
    if calibration is not None or not wanted.needs_data or wanted.needs_labels:
        return config.method, []
    note = (
        f"no calibration data and no tokenizer beside the model: magnitude scores instead of {config.method}, "
        "and no refit; expect a much worse model"
    )
    warnings.warn(note, UserWarning, stacklevel=3)
    return "magnitude", [note]


def _cut_equals_masked(dense: Graph, pruned: Graph, plan: Any) -> Rung:
    """The central check: the cut graph gives what the masked dense one gives."""
    masked = dense.copy()
    run_passes(masked, [Mask(plan)])
    detail = "before reconstruction, random inputs at two shapes"
    cut = as_cut(dense, plan)
    worst = _difference(dense, masked, pruned, cut)
    if not worst <= CUT_TOLERANCE:
        # Weights far from what training leaves make float32 itself differ by more: then float64 tells.
        detail += f"; in float64, since float32 rounds to {worst:.0e} in this model"
        try:
            worst = _difference(dense, masked.in_double(), pruned.in_double(), cut, torch.float64)
        except RuntimeError as e:
            # A cast inside the model keeps some of it in float32.
            log.debug("cannot compare in float64: %s", e)
    if not worst <= CUT_TOLERANCE:
        inputs = make_inputs(dense, *CUT_SHAPES[0], seed=100)
        if odd := [n for n, x in dense.run(inputs).items() if x.is_floating_point() and not x.isfinite().any()]:
            raise CaptureError(
                dense.module._get_name(),
                f"the model itself gives no finite {odd[0]} on random inputs",
                fix="look for NaN or infinity in its weights and statistics",
            )
        raise VerificationError(
            "prune",
            "the cut graph differs from the masked dense one",
            got=f"relative error {worst:.2e}",
            wanted=f"at most {CUT_TOLERANCE:.0e}",
            fix="please report the model: an op rule is wrong",
        )
    return rung("cut equals masked dense", worst, CUT_TOLERANCE, detail)


def _difference(
    dense: Graph,
    masked: Graph,
    pruned: Graph,
    cut: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
) -> float:
    worst = 0.0
    for i, (batch, length) in enumerate(CUT_SHAPES):
        inputs = make_inputs(dense, batch, length, seed=100 + i)
        inputs = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in inputs.items()}
        worst = max(worst, largest_error(cut(masked.run(inputs)), pruned.run(cut(inputs))))
    return worst


def _write_module(pruned: Graph, folder: Path) -> None:
    """The pruned model for PyTorch: its graph without weights, and its weights once."""
    program = export_program(pruned)
    save_program(program, folder / MODULE)
    held: dict[str, torch.Tensor] = {}
    storages = set()
    for name, tensor in tensors_of(program).items():
        tensor = tensor.contiguous()
        # safetensors refuses tensors that share storage; those that the graph knows to be tied are there once already.
        held[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(held[name].untyped_storage().data_ptr())
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read.
    (folder / WEIGHTS).chmod((folder / MODULE).stat().st_mode)
