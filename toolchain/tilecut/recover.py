"""Train a pruned graph until it follows the dense one again, on the calibration batches.

Before: a pruned graph and the dense one that it was made from. After: the pruned graph has the weights that were best on
the held-out batches, under the same names; where training made nothing better, those that it had. Left alone: the dense
graph and the caller's model, with which an uncut tensor is shared until here; buffers, such as a batch norm's
statistics; parameters that do not require gradients.

AdamW (Loshchilov and Hutter, 1711.05101), a linear warm-up, then a cosine to 0. Calibration batches of more than
`batch_rows` rows are split: few passes over few data need many small steps. An optimizer step covers `accumulate` of
those, in an order that the seed gives, however many processes share them: they take whole batches where that comes
out even, else rows of each batch. So n processes do what one does, up to the order of addition.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilecut.distillation import Cut, Distillation
from tilecut.join_processes import join_processes
from tilecut.recovery_config import Recovery
from tilecut.save_recovery import State, checkpoint_path, read_checkpoint, write_checkpoint
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.share_batches import own_share, process, total
from tilecut_runtime.errors import CalibrationError, ConfigError, RecoveryError

Progress = Callable[[int, int], None]
KINDS = ("model", "first", "second", "best")


@dataclass
class RecoveryReport:
    """What a recovery did.

    Attributes:
        steps: optimizer steps; `resumed_at`: the one that it was resumed at, 0 for a run of one piece.
        processes: how many shared the work.
        held_out_loss: before training, then after every epoch.
        best_epoch: the one whose weights were kept; 0: those from before training.
        training_loss: mean of every epoch.
        compared: the outputs that were compared; `hidden_states`: how many of those were.
    """

    steps: int
    processes: int
    compared: list[str]
    hidden_states: int
    resumed_at: int = 0
    held_out_loss: list[float] = field(default_factory=list)
    training_loss: list[float] = field(default_factory=list)
    best_epoch: int = 0
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """As the report holds it."""
        return asdict(self)


def recover(
    dense: Graph,
    pruned: Graph,
    fit: Sequence[Batch],
    held_out: Sequence[Batch],
    config: Recovery,
    seed: int = 0,
    progress: Progress | None = None,
    cut: Cut = dict,
    outputs: Sequence[str] | None = None,
) -> RecoveryReport:
    """Train `pruned` in place; returns what that gave.

    `cut` makes the dense graph's inputs those of the pruned one (see `as_cut`). `outputs` are those that count, None:
    all that both have.

    Raises:
        RecoveryError: the loss or its gradient is not finite; `pruned` has the best weights from before that.
        CalibrationError: no batches, no labels where they are asked for, or nothing to compare.
        ConfigError: accelerate is not installed, nothing can be trained, or a checkpoint cannot be written.
    """
    if not fit or not held_out:
        raise CalibrationError("recover", "no batches to train on" if not fit else "no batches to judge by")
    if config.labels and all(b.labels is None for b in fit):
        raise CalibrationError("recover", "no batch has labels", fix="add labels to the batches, or leave labels=None")
    device = join_processes(cpu=config.device == "cpu")
    # Named before anything moves: by weights and batches as they were given.
    path = checkpoint_path(config.checkpoint, config, seed, pruned.tensors, fit) if config.checkpoint else None
    run = _Run(Distillation.of(dense, pruned, config, device, fit, cut, outputs), fit, held_out, config, seed, path)
    try:
        run.train(progress or (lambda done, of: None))
    finally:
        # Also when training is interrupted: what is best so far is no worse than what was there.
        run.keep_best(pruned)
    return run.report


class _Run:
    def __init__(
        self,
        task: Distillation,
        fit: Sequence[Batch],
        held_out: Sequence[Batch],
        config: Recovery,
        seed: int,
        path: Path | None,
    ):
        self.task, self.held_out, self.config, self.seed, self.path = task, held_out, config, seed, path
        self.fit = training_batches(task.student, fit, config.batch_rows)
        self.parameters = task.parameters()
        if not self.parameters:
            raise ConfigError("recover", "no parameter requires gradients", fix="call model.requires_grad_(True)")
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.per_epoch = math.ceil(len(self.fit) / config.accumulate)
        self.steps = self.per_epoch * config.epochs
        self.optimizer = _optimizer(self.parameters, config)
        self.report = RecoveryReport(self.steps, process()[1], task.compared, len(task.hidden))

    def train(self, progress: Progress) -> None:
        """Run every step that a checkpoint has not done yet."""
        report, losses = self.report, [0.0]
        start = self._resume(losses)
        if not report.held_out_loss:
            report.held_out_loss.append(self._judge())
        for step in range(start, self.steps):
            epoch, i = divmod(step, self.per_epoch)
            order = random.Random(f"{self.seed} {epoch}").sample(range(len(self.fit)), len(self.fit))
            size = self.config.accumulate
            losses[0] += self._step([self.fit[k] for k in order[i * size : (i + 1) * size]], step)
            if i + 1 == self.per_epoch:
                report.training_loss.append(losses[0] / self.per_epoch)
                losses[0] = 0.0
                self._close_epoch(epoch + 1)
            if self.path and ((step + 1) % self.config.checkpoint_every == 0 or step + 1 == self.steps):
                self._save(step + 1, losses[0])
            progress(step + 1, self.steps)
        if report.best_epoch == 0:
            report.notes.append(
                f"recovery made the held-out loss no better ({report.held_out_loss[0]:.4g} before, "
                f"{min(report.held_out_loss[1:]):.4g} at best): the weights from before it are kept"
            )

    def keep_best(self, pruned: Graph) -> None:
        """Give the caller's graph the best weights."""
        for name, tensor in self.best.items():
            pruned.set_tensor(name, nn.Parameter(tensor.to(pruned.tensor(name).device)))
        pruned.module.recompile()

    def _step(self, batches: Sequence[Batch], step: int) -> float:
        rate = learning_rate(step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros((), device=self.task.device)
        for part, whole in shares(self.task.student, batches):
            one = self.task.loss(part, whole) / len(batches)
            # Nothing in this part counts, such as a part without labels.
            if one.requires_grad:
                one.backward()
            loss += one.detach()
        # A parameter without a gradient here may have one in another process.
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if process()[1] > 1:
            # One sum over all gradients. DistributedDataParallel sums at every backward pass, gives each process equally
            # many, and averages them, where shares may be uneven here.
            together = total(torch.cat([loss[None], *[_grad(p).flatten() for p in self.parameters.values()]]))
            loss, parts = together[0], together[1:].split([p.numel() for p in self.parameters.values()])
            for p, part in zip(self.parameters.values(), parts, strict=True):
                _grad(p).copy_(part.view_as(p))
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip or math.inf)
        if not (loss.isfinite() and norm.isfinite()):
            raise RecoveryError(
                "recover",
                f"the loss or its gradient is not finite at step {step + 1} of {self.steps}, learning rate {rate:.2e}",
                got=f"loss {float(loss):.3g}, gradient norm {float(norm):.3g}",
                fix="lower learning_rate; the model has its best weights from before",
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)

    def _judge(self) -> float:
        """The mean loss of the outputs on the held-out batches."""
        summed = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for _, batch in own_share(self.held_out):
                summed += self.task.loss(batch, batch, hidden=False).double().cpu()
        return float(total(summed)) / len(self.held_out)

    def _close_epoch(self, epoch: int) -> None:
        report = self.report
        report.held_out_loss.append(self._judge())
        if report.held_out_loss[-1] < min(report.held_out_loss[:-1]):
            report.best_epoch = epoch
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}

    def _save(self, step: int, losses: float) -> None:
        assert self.path is not None
        held: dict[str, dict[str, Tensor]] = {"model": dict(self.parameters), "best": self.best}
        for kind, moment in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            held[kind] = {name: self.optimizer.state[p][moment] for name, p in self.parameters.items()}
        report = self.report
        numbers = {
            "losses": losses,
            "held_out_loss": report.held_out_loss,
            "training_loss": report.training_loss,
            "best_epoch": report.best_epoch,
        }
        write_checkpoint(self.path, State(step, held, numbers))

    def _resume(self, losses: list[float]) -> int:
        state = read_checkpoint(self.path, KINDS, self.parameters) if self.path else None
        step = state.step if state else 0
        # Every process has to see the same file.
        if int(total(torch.tensor(step))) != step * process()[1]:
            raise ConfigError(
                "Recovery", "the processes see different checkpoints", fix="give a folder that all of them share"
            )
        if state is None:
            return 0
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state.tensors["model"][name])
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": state.tensors["first"][name].to(p.device),
                    "exp_avg_sq": state.tensors["second"][name].to(p.device),
                }
        self.best = {name: t.to(self.task.device) for name, t in state.tensors["best"].items()}
        losses[0] = state.numbers["losses"]
        self.report.held_out_loss = state.numbers["held_out_loss"]
        self.report.training_loss = state.numbers["training_loss"]
        self.report.best_epoch = state.numbers["best_epoch"]
        self.report.resumed_at = step
        return step


def learning_rate(step: int, steps: int, config: Recovery) -> float:
    """Of optimizer step `step`, from 0: up in a line, down in a cosine that ends in 0."""
    rising = math.ceil(config.warmup * steps)
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def shares(graph: Graph, batches: Sequence[Batch]) -> list[tuple[Batch, Batch]]:
    """What this process does of some batches: parts, each with the batch that it is of."""
    rank, count = process()
    if len(batches) % count == 0:
        return [(b, b) for b in batches[rank::count]]
    parts = [rows_dealt(graph, batch, count) for batch in batches]
    # Rows that cannot be told apart stay together: correct, and no faster than one process.
    if any(len(part) != count for part in parts):
        return [(b, b) for b in batches[rank::count]]
    return [(part[rank], batch) for part, batch in zip(parts, batches, strict=True)]


def rows_dealt(graph: Graph, batch: Batch, count: int) -> list[Batch]:
    """A batch's rows dealt into `count` batches; the batch itself where its rows cannot be told apart, or are fewer."""
    sizes = {t.shape[0] if t.ndim else 0 for t in batch.inputs.values()}
    if count < 2 or len(graph.row_sizes()) != 1 or len(sizes) != 1 or min(sizes) < count:
        return [batch]
    hands = [slice(i, None, count) for i in range(count)]
    labels = batch.labels
    return [
        replace(
            batch,
            inputs={k: v[at] for k, v in batch.inputs.items()},
            labels=labels[at] if labels is not None else None,
        )
        for at in hands
    ]


def training_batches(graph: Graph, batches: Sequence[Batch], rows: int | None) -> list[Batch]:
    """The batches to train on, of at most so many rows; None: as they are."""
    if rows is None:
        return list(batches)
    size = lambda batch: max((t.shape[0] for t in batch.inputs.values() if t.ndim), default=1)
    return [part for b in batches for part in rows_dealt(graph, b, math.ceil(size(b) / rows))]


def _optimizer(parameters: dict[str, nn.Parameter], config: Recovery) -> torch.optim.AdamW:
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate)


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
