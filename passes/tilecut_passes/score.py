"""Importance: in which order a group's units should go, and what is lost when only k of them stay.

Each method is a function from the dense graph, its groups and calibration batches to a `Ranking` for every group:

    obs        optimal brain surgeon in the metric of the model's own outputs (see `score_surgeon.py`); the default
    fisher     diagonal Fisher information of the gates (see `score_gates.py`)
    taylor     first-order change of the loss at the gates; needs labels (see `score_gates.py`)
    magnitude  norm of everything that a unit owns; needs no data (below)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilecut_passes.axes.groups import Group
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import CalibrationError, ConfigError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ranking:
    """How a group should shrink.

    Attributes:
        order: the units, the first to go first.
        losses: what is lost when k units stay, for k = 0..size; 0 at the end.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]

    @staticmethod
    def of_scores(scores: Tensor) -> Ranking:
        """From one number a unit (larger stays longer): losses add up; ties go to the higher index first."""
        order = tuple(reversed(scores.argsort(descending=True, stable=True).tolist()))
        removed = [0.0, *scores[list(order)].double().cumsum(0).tolist()]
        return Ranking(order, tuple(reversed(removed)))

    def scaled(self, factor: float) -> Ranking:
        """The same order, losses times `factor`."""
        return Ranking(self.order, tuple(factor * loss for loss in self.losses))

    def best(self, count: int) -> tuple[int, ...]:
        """The `count` units that stay longest, in their old order."""
        return tuple(sorted(self.order[len(self.order) - count :]))


Compute = Callable[[Graph, Sequence[Group], Sequence[Batch], int, Progress], Mapping[str, Ranking]]


@dataclass(frozen=True)
class Importance:
    """A named method: what it needs, and the module and function that compute it (imported when asked for)."""

    needs_data: bool
    needs_labels: bool
    compute: Callable[[], Compute]


def score(
    method: str,
    graph: Graph,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Ranking]:
    """Rankings of every group by the named method.

    Raises:
        ConfigError: no such method.
        CalibrationError: the method needs batches or labels that are not there, or a score is not finite.
    """
    importance = IMPORTANCES.get(method)
    if importance is None:
        raise ConfigError("score", "unknown method", got=repr(method), wanted=" or ".join(map(repr, IMPORTANCES)))
    if importance.needs_data and not batches:
        raise CalibrationError(
            "score", f"method {method!r} needs calibration batches", fix="pass calibration=, or method='magnitude'"
        )
    if importance.needs_labels and any(b.labels is None for b in batches):
        raise CalibrationError(
            "score",
            f"method {method!r} needs labels",
            got="batches without labels",
            fix="add labels to the batches, or use method='obs' or 'fisher'",
        )
    rankings = importance.compute()(graph, groups, batches, seed, progress or (lambda done, of: None))
    for name, ranking in rankings.items():
        if not all(math.isfinite(loss) for loss in ranking.losses):
            raise CalibrationError(
                "score",
                f"the scores of {name} are not finite",
                fix="look for NaN or infinity in the model's weights or the calibration data",
            )
    return dict(rankings)


def score_magnitude(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """L2 norm of everything that a unit owns, relative to its group's mean."""
    rankings = {}
    for i, group in enumerate(groups):
        total = torch.zeros(group.size, dtype=torch.float64)
        for units in member_slices(graph, group):
            total += units.double().square().reshape(group.size, -1).sum(1).cpu()
        norms = total.sqrt()
        rankings[group.name] = Ranking.of_scores(norms / norms.mean().clamp_min(1e-12))
        progress(i + 1, len(groups))
    return rankings


def member_slices(graph: Graph, group: Group) -> Iterator[Tensor]:
    """For each member that is a weight, its part with the group's units first: [size, ..]."""
    for member in group.members:
        tensor = graph.tensor(member.parameter).detach()
        if tensor.is_floating_point():
            part = tensor.narrow(member.dim, member.start, math.prod(member.view)).unflatten(member.dim, member.view)
            yield part.movedim(member.dim + member.axis, 0)


def _surgeon() -> Compute:
    from tilecut_passes.score_surgeon import score_surgeon

    return score_surgeon


def _fisher() -> Compute:
    from tilecut_passes.score_gates import score_fisher

    return score_fisher


def _taylor() -> Compute:
    from tilecut_passes.score_gates import score_taylor

    return score_taylor


IMPORTANCES: dict[str, Importance] = {
    "obs": Importance(needs_data=True, needs_labels=False, compute=_surgeon),
    "fisher": Importance(needs_data=True, needs_labels=False, compute=_fisher),
    "taylor": Importance(needs_data=True, needs_labels=True, compute=_taylor),
    "magnitude": Importance(needs_data=False, needs_labels=False, compute=lambda: score_magnitude),
}
