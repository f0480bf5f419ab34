"""Cut a prepared model to a budget: choose the plan, prune, check, repair in closed form, recover by training.

With `Recovery(steps=N)` the budget is reached in N cuts, each repaired and recovered (`prune_in_steps.py`); the plans on
the way lie between the dense model and the final plan, and each is within the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sympy

from tilecut.check_cut import check_cut
from tilecut.check_token_cut import check_token_cut
from tilecut.check_tokens import check_tokens
from tilecut.choose_plan import Choice, choose_plan, keep_everything
from tilecut.config import PruneConfig
from tilecut.measure_fidelity import measure_fidelity
from tilecut.plan_tokens import TokenSchedule
from tilecut.prepare import Prepared
from tilecut.progress import Progress
from tilecut.prune_in_steps import prune_in_steps
from tilecut.recover import recover
from tilecut.search_tokens import search_tokens
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan
from tilecut_passes.project_outputs import DropProjections
from tilecut_passes.prune import Prune, as_cut
from tilecut_passes.prune_tokens import removes, token_passes, two_stay
from tilecut_passes.reconstruct import Reconstruct
from tilecut_passes.run_passes import PassRecord, run_passes
from tilecut_passes.tune_masks import TuneMasks
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.manifest import Rung


@dataclass
class CutModel:
    """A pruned graph and how it came about; `recovery` holds what each training did.

    `shortest` are sizes below which the exported program does not work, since only one token would stay.
    """

    graph: Graph
    choice: Choice
    records: list[PassRecord] = field(default_factory=list)
    rungs: list[Rung] = field(default_factory=list)
    recovery: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shortest: dict[str, int] = field(default_factory=dict)


def cut_model(made: Prepared, config: PruneConfig | None, progress: Progress) -> CutModel:
    """The prepared model within the budgets of `config`; None cuts nothing. Tokens go last.

    Raises:
        ConfigError: a budget that no legal model meets.
        VerificationError: the cut graph is not the masked dense one.
    """
    cut = _cut_groups(made, config, progress)
    tokens = cut.choice.plan.tokens
    if removes(tokens):
        with progress.stage("tokens"):
            whole = cut.graph.copy()
            searched = made.tokens or made.token_losses
            if searched is not None and isinstance(size := searched.stream.size, sympy.Symbol):
                cut.shortest[whole.dims[size]] = two_stay(tokens)
            cut.records += run_passes(cut.graph, token_passes(tokens))
            cut.rungs.append(check_token_cut(whole, cut.graph, tokens))
    return cut


def _cut_groups(made: Prepared, config: PruneConfig | None, progress: Progress) -> CutModel:
    if config is None:
        at, made = PruneConfig().sizes(), made.unturned()
        choice = keep_everything(made.dense, made.axes, made.groups, at, made.target)
        cut = CutModel(made.dense.copy(), choice)
        _prune(made, cut, choice.plan, progress)
        return cut
    with progress.stage("search"):
        choice = _choose(made, config)
    hidden = [g for g in choice.plan.groups if g.kind == "hidden"]
    if made.rotations and all(len(g.kept) == g.size for g in hidden):
        # A hidden width that stays whole stays as it is.
        made = made.unturned()
        with progress.stage("search"):
            choice = _choose(made, config.model_copy(update={"keep": (*config.keep, "hidden")}))
    cut = CutModel(made.dense.copy(), choice, rungs=list(made.rungs))
    if config.finetune is None or config.finetune.steps == 1:
        _prune(made, cut, choice.plan, progress)
        _repair(made, config, cut, choice.plan, progress)
        if config.finetune is not None:
            _recover(made, config, cut, choice.plan, progress)
        return cut
    return _in_steps(made, config, cut, progress)


def _choose(made: Prepared, config: PruneConfig) -> Choice:
    def choose(tokens: TokenSchedule | None) -> Choice:
        return choose_plan(
            made.dense,
            made.axes,
            made.groups,
            made.rankings,
            config,
            made.target,
            made.latency,
            made.fisher,
            tokens,
            made.words,
        )

    if made.token_losses is None:
        choice = choose(made.tokens)
    else:
        counts = lambda schedule: schedule.counter(made.axes, find_groups(made.axes), config.sizes()).total()
        choice = search_tokens(made.token_losses, counts, choose)
    return replace(choice, plan=replace(choice.plan, rotations=made.rotations))


def _prune(made: Prepared, cut: CutModel, plan: PrunePlan, progress: Progress) -> None:
    with progress.stage("prune"):
        cut.records += run_passes(cut.graph, [Prune(plan)])
        cut.rungs.append(check_cut(made.dense, cut.graph, plan))
        # The hidden width stayed: no layer is needed to bring it back.
        cut.records += run_passes(cut.graph, [DropProjections()])


def _repair(made: Prepared, config: PruneConfig, cut: CutModel, plan: PrunePlan, progress: Progress) -> None:
    """Refit, or tune the masks, on the calibration data; nothing without."""
    if not config.reconstruct or made.calibrated is None:
        return
    offload = Path(config.offload) if config.offload is not None else None
    with progress.stage("reconstruct"):
        if config.method == "fisher":
            repair = TuneMasks(made.dense, made.calibrated.fit, plan, offload=offload, progress=progress.step)
        else:
            repair = Reconstruct(made.dense, made.calibrated.fit, plan, offload=offload, progress=progress.step)
            widths = {g.name: len(g.kept) for g in plan.groups if g.kind == "neurons"}
            cut.notes += [note for note in check_tokens(made.calibrated, widths) if note not in cut.notes]
        cut.records += run_passes(cut.graph, [repair])


def _recover(made: Prepared, config: PruneConfig, cut: CutModel, plan: PrunePlan, progress: Progress) -> None:
    if config.finetune is None or made.calibrated is None:
        raise _no_data()
    with progress.stage("recover"):
        report = recover(
            made.dense,
            cut.graph,
            made.calibrated.fit,
            made.calibrated.held_out,
            config.finetune,
            config.seed,
            progress.step,
            as_cut(made.dense, plan),
            config.outputs,
        )
    cut.recovery.append(report.as_json())
    cut.notes += report.notes


def _in_steps(made: Prepared, config: PruneConfig, cut: CutModel, progress: Progress) -> CutModel:
    """Reach the budget in several cuts, each repaired and recovered; where quality falls too far, stop before that."""
    assert config.finetune is not None
    if made.calibrated is None:
        raise _no_data()
    held_out = made.calibrated.held_out
    choices = plans_between(made, config, cut.choice, config.finetune.steps)

    def repair(graph: Graph, plan: PrunePlan) -> None:
        cut.graph = graph
        cut.rungs = [*made.rungs, check_cut(made.dense, graph, plan)] if plan is choices[0].plan else cut.rungs
        _repair(made, config, cut, plan, progress)

    def train(graph: Graph, plan: PrunePlan) -> None:
        cut.graph = graph
        _recover(made, config, cut, plan, progress)

    def quality(graph: Graph, plan: PrunePlan) -> float:
        measured = measure_fidelity(made.dense, graph, held_out, as_cut(made.dense, plan))
        cosines = [one["cosine"] for name, one in measured.items() if name != "task"]
        return sum(cosines) / len(cosines)

    done = prune_in_steps(
        made.dense, [c.plan for c in choices], repair, train, quality, config.finetune.floor
    )
    reached = choices[done.reached]
    cut.notes += done.notes
    return replace(cut, graph=done.graph, choice=reached)


def _no_data() -> ConfigError:
    return ConfigError("finetune", "there are no data to train with", fix="pass calibration=")


def plans_between(made: Prepared, config: PruneConfig, final: Choice, steps: int) -> list[Choice]:
    """Choices on the way from the dense model to the final one, each within the one before, the final one last.

    Step i keeps f^(i/steps) of the prunable MACs, f what the final one keeps: every cut takes the same share.
    """
    if made.fisher is not None:
        raise ConfigError("finetune", "steps need nested plans, which method='fisher' has not", fix="use method='table'")
    macs = final.macs()
    kept = macs["prunable_pruned"] / macs["prunable_dense"]
    # Words are no matter of a budget.
    searched = {g.name for g in made.groups}
    least = {g.name: len(g.kept) for g in final.plan.groups if g.name in searched}
    most: dict[str, int] = {}
    choices = []
    for i in range(1, steps):
        sparsity = min(max(1 - kept ** (i / steps), 0.0), 1 - 1e-9)
        budgets = dict.fromkeys(("max_macs", "max_params", "max_bytes", "max_latency_ms", "attention_sparsity"))
        loose = config.model_copy(
            update={
                **budgets,
                "sparsity": sparsity,
                "num_heads_keep": None,
                "min_units": {**config.min_units, **least},
                "max_units": {**config.max_units, **most},
            }
        )
        choices.append(_choose(made, loose))
        most = {g.name: len(g.kept) for g in choices[-1].plan.groups if g.name in searched}
    return [*choices, final]
