"""All of a compile that depends on no budget: the model captured, typed, calibrated, ranked and priced.

One `Prepared` serves any number of cuts (`cut_model.py`): `tilecut explore` makes many.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilecut.check_sizes import check_sizes
from tilecut.choose_plan import constraints
from tilecut.choose_words import Words, choose_words
from tilecut.config import PruneConfig
from tilecut.load_calibration import Calibration, load_calibration
from tilecut.load_model import load_model
from tilecut.plan_tokens import TokenSchedule, fused_stream, plan_tokens
from tilecut.progress import Progress
from tilecut.search_tokens import TokenLosses, measure_token_losses
from tilecut.turn_hidden import turn_hidden
from tilecut_passes.axes.groups import Frozen, Group, find_frozen, find_groups
from tilecut_passes.axes.infer import Axes, infer
from tilecut_passes.capture import capture
from tilecut_passes.check_finite import check_finite, check_weights
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.disk_tensor import DiskTensors
from tilecut_passes.example_inputs import DynamicDims
from tilecut_passes.find_token_sites import TokenStream
from tilecut_passes.graph import Graph
from tilecut_passes.legal_sizes import legal_sizes
from tilecut_passes.plan import PrunePlan
from tilecut_passes.project_outputs import ProjectOutputs, without_projections
from tilecut_passes.rank_by_table import TableRanking, rank_by_table
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import IMPORTANCES, Ranking, score
from tilecut_passes.score_gates import fisher_matrices
from tilecut_runtime.errors import CalibrationError, CaptureError, ConfigError
from tilecut_runtime.manifest import Rung
from tilecut_targets.cost_model import CostModel
from tilecut_targets.target import Target


@dataclass
class Prepared:
    """A model that is ready to be cut to any budget.

    Attributes:
        model: what was given, loaded where it was a folder.
        dense: its graph, typed by `axes`; `groups` are those that may be cut.
        calibrated: None where there are no data, and for a dense compile.
        method: what ranks: "table", "fisher" or an importance; None for a dense compile.
        rankings: of every group, but with "fisher", whose matrices are in `fisher`.
        table: what the cost table held, with method "table".
        latency: the target's cost model, where a budget of milliseconds asks for it.
        tokens: those that the config says go; `token_losses` where it says to search for them.
        words: what stays of the vocabulary, where it is cut.
        rotations: bases that hidden widths of `dense` were turned to; `straight` is what was prepared before.
        rungs: what was checked so far.
        turned: those of `notes` that tell of the turning.
    """

    model: nn.Module
    target: Target
    dense: Graph
    axes: Axes
    groups: list[Group]
    calibrated: Calibration | None = None
    method: str | None = None
    rankings: Mapping[str, Ranking] = field(default_factory=dict)
    fisher: Mapping[str, Tensor] | None = None
    table: TableRanking | None = None
    latency: CostModel | None = None
    tokens: TokenSchedule | None = None
    token_losses: TokenLosses | None = None
    words: Words | None = None
    rotations: Mapping[str, Tensor] = field(default_factory=dict)
    straight: Prepared | None = None
    rungs: list[Rung] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    @property
    def original(self) -> Graph:
        """The dense graph as the caller has it, without what makes the hidden width prunable."""
        return without_projections((self.straight or self).dense)

    def unturned(self) -> Prepared:
        """The same with every hidden width in the caller's basis."""
        if self.straight is None:
            return self
        before = self.straight
        # A head of its own can make a group's name another one.
        named = {new.name: old.name for new, old in zip(self.groups, before.groups, strict=True)}
        rankings = {named[name]: one for name, one in self.rankings.items()}
        return replace(
            self,
            dense=before.dense,
            axes=before.axes,
            groups=before.groups,
            words=before.words,
            rankings=rankings,
            rotations={},
            straight=None,
            rungs=[],
            notes=[note for note in self.notes if note not in self.turned],
        )

    def of_plan(self, plan: PrunePlan) -> Prepared:
        """The same in the basis that a plan is of."""
        return self if plan.rotations else self.unturned()

    @property
    def fit(self) -> list:
        """The batches to fit with; none without data."""
        return self.calibrated.fit if self.calibrated is not None else []


def prepare(
    model: nn.Module | str | Path,
    target: Target,
    example_inputs: Any,
    calibration: Any,
    config: PruneConfig | None,
    dynamic_shapes: DynamicDims | None,
    progress: Progress,
    latency: bool = False,
) -> Prepared:
    """Capture a model and, unless `config` is None, rank its groups.

    Args:
        latency: measure the target's cost model even where no budget needs it.

    Raises:
        TilecutError: a subclass says what cannot be done, and why.
    """
    offload = Path(config.offload) if config is not None and config.offload is not None else None
    if isinstance(model, str | Path):
        model = load_model(Path(model), offload)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            "compile_pruned", "not a PyTorch model", got=type(model).__name__, wanted="an nn.Module or a model folder"
        )
    with progress.stage("capture"):
        dense = capture(model, example_inputs, dynamic_shapes)
        dense.store = DiskTensors(offload) if offload is not None else None
        name = type(model).__name__
        _check_dtype(dense, name)
        check_sizes(dense, name)
        _check_at(dense, config)
        if config is not None and "hidden" in config.kinds:
            run_passes(dense, [ProjectOutputs()])
    with progress.stage("axes"):
        axes = infer(dense)
        every_group = find_groups(axes)
    if config is None:
        groups = [g for g in every_group if g.kind in PruneConfig().kinds]
        made = Prepared(model, target, dense, axes, groups, notes=list(dense.notes))
        if target.needs_data:
            with progress.stage("calibration"):
                made.calibrated = load_calibration(calibration, dense, model, PruneConfig().sizes()["sequence"])
                _check_data(made)
        return made
    frozen = find_frozen(axes)
    groups = _prunable(every_group, config, name, frozen)
    made = Prepared(model, target, dense, axes, groups, notes=list(dense.notes))
    fused, stream = fused_stream(dense) if config.tokens is not None else (None, None)
    if isinstance(config.tokens, Mapping) and stream is not None:
        made.tokens = TokenSchedule(stream, plan_tokens(stream, config.tokens, config.tokens_restored))
    if config.vocabulary is not None:
        why = next((f"{f.name}: {f.why}" for f in frozen if f.why != "input of the model"), "it looks up no ids")
        made.words = choose_words(config.vocabulary, every_group, dense, model, why)
        made.notes.append(made.words.note)
    # What cannot be honoured is said before the long work.
    lattice = target.lattice(config.block, config.power_of_two_heads)
    sizes = legal_sizes(groups, lattice, constraints(axes, groups, config, target))
    with progress.stage("calibration"):
        check_weights(dense)
        made.calibrated = load_calibration(
            calibration, dense, model, config.sizes()["sequence"], config.seed, config.mixture
        )
        if made.calibrated is not None:
            check_finite(dense, made.calibrated.fit)
        _check_data(made)
    if config.rotate and made.calibrated is not None and any(g.kind == "hidden" for g in groups):
        with progress.stage("rotate"):
            turn_hidden(made, progress.step)
        sizes = legal_sizes(made.groups, lattice, constraints(made.axes, made.groups, config, target))
    if config.max_latency_ms is not None or latency:
        with progress.stage("cost model"):
            made.latency = _cost_model(made, config, progress, needed=config.max_latency_ms is not None)
    if not groups:
        return made
    made.method = _method(config, made)
    with progress.stage(f"score ({made.method})"):
        _rank(made, config, sizes, progress)
    if config.tokens == "search" and fused is not None and stream is not None:
        with progress.stage("tokens"):
            made.token_losses = _token_losses(made, config, fused, stream, progress)
    return made


def _token_losses(
    made: Prepared, config: PruneConfig, fused: Graph, stream: TokenStream, progress: Progress
) -> TokenLosses:
    if made.method != "table" or config.max_latency_ms is not None:
        raise ConfigError(
            "tokens",
            "'search' weighs tokens against units by measured losses and MACs",
            got=f"method {made.method!r}" if made.method != "table" else "max_latency_ms",
            fix="give calibration with method='table' and a budget of MACs, or say which tokens go: {2: 0.5}",
        )
    outputs = _outputs(made.dense, config)
    return measure_token_losses(fused, stream, made.fit, outputs, config.tokens_restored, progress.step)


def _check_data(made: Prepared) -> None:
    """Whether the quantization has the data that it needs."""
    if made.target.needs_data and made.calibrated is None:
        raise CalibrationError(
            "quantize",
            f"{made.target.quantize!r} takes the ranges of activations from calibration data, and there is none",
            fix="give calibration, or quantize='int8', which takes them in the run",
        )


def _rank(made: Prepared, config: PruneConfig, sizes: Mapping[str, Sequence[int]], progress: Progress) -> None:
    scored = made.calibrated.scoring if made.calibrated is not None else []
    if made.method == "table":
        made.table = rank_by_table(
            made.dense,
            made.groups,
            sizes,
            made.fit,
            config.importance,
            _outputs(made.dense, config),
            config.cache_folder,
            config.seed,
            progress.step,
        )
        made.rankings = made.table.rankings
        made.notes += made.table.notes
    elif made.method == "fisher":
        made.fisher = fisher_matrices(made.dense, made.groups, scored, config.seed, progress.step)
        made.rankings = {n: Ranking.of_scores(matrix.diagonal()) for n, matrix in made.fisher.items()}
    else:
        assert made.method is not None
        made.rankings = score(made.method, made.dense, made.groups, scored, config.seed, progress.step)


def _outputs(graph: Graph, config: PruneConfig) -> tuple[str, ...]:
    """The outputs that count in a cost table."""
    floating = [s.name for s in graph.output_specs() if getattr(torch, s.dtype).is_floating_point]
    if config.outputs is None:
        return tuple(name for name in floating if name not in graph.states.values())
    if unknown := [name for name in config.outputs if name not in floating]:
        raise ConfigError(
            "PruneConfig", "outputs names no floating output", got=repr(unknown[0]), wanted=", ".join(floating)
        )
    return config.outputs


def _cost_model(made: Prepared, config: PruneConfig, progress: Progress, needed: bool) -> CostModel | None:
    at = config.sizes()
    # Branches are there or not, and the hidden width is priced by its MACs: neither is measured.
    groups = [g for g in made.groups if g.kind not in ("layers", "hidden")]
    sets = MacCounter(made.axes, find_groups(made.axes), at).groups_together([g.name for g in groups])
    lattice = made.target.lattice(config.block, config.power_of_two_heads)
    found = made.target.cost(
        made.dense, made.axes, groups, sets, at, lattice, config.cache_folder, progress.step
    )
    if found is None and needed:
        raise ConfigError(
            "PruneConfig",
            f"max_latency_ms is asked for, but the {made.target} target has no latency model",
            fix="give sparsity, max_macs, max_params or max_bytes",
        )
    if found is not None:
        made.notes += found.notes
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


def _prunable(groups: Sequence[Group], config: PruneConfig, model: str, frozen: Sequence[Frozen]) -> list[Group]:
    # Words do not compete with other units for a budget: the caller says which stay.
    found = [g for g in groups if g.kind in config.kinds and g.kind != "vocab"]
    if not found and config.vocabulary is None:
        reasons = "; ".join(f"{f.name}: {f.why}" for f in frozen[:3]) or "it has no contraction with a free dimension"
        raise ConfigError(
            model,
            f"nothing in this model can be cut ({', '.join(config.kinds)})",
            got=reasons,
            fix="ask for other kinds, or config=None for a dense compile",
        )
    return found


def _method(config: PruneConfig, made: Prepared) -> str:
    """The method to use: what was asked for, or magnitude where there is no data.

    A method that needs labels was chosen with them in mind: it is not replaced, so that `score` says what is missing.
    """
    wanted = IMPORTANCES.get(config.importance if config.method == "table" else config.method)
    if made.calibrated is not None or (wanted is not None and (wanted.needs_labels or not wanted.needs_data)):
        if made.calibrated is None and config.method == "table":
            return config.importance
        return config.method
    note = (
        f"no calibration data and no tokenizer beside the model: magnitude scores instead of {config.method}, "
        "and no refit; expect a much worse model"
    )
    warnings.warn(note, UserWarning, stacklevel=4)
    made.notes.append(note)
    return "magnitude"
