"""Importance: in which order a group's units should go, and what is lost when only k of them stay.

Each method is a function from the dense graph, its groups and calibration batches to a `Ranking` for every group.
`IMPORTANCES` names them and the module that specifies each; docs/importance.md compares them. Losses of all groups are
traded in one knapsack, so a method gives them one scale, and its module says which.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tilecut_passes.axes.groups import Group
from tilecut_passes.calibration import Batch
from tilecut_passes.check_finite import check_weights
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
        CalibrationError: the method needs batches or labels that are not there; a weight, an activation (both named) or
            a score is not finite.
    """
    importance = IMPORTANCES.get(method)
    if importance is None:
        raise ConfigError("score", "unknown method", got=repr(method), wanted=" or ".join(map(repr, IMPORTANCES)))
    if importance.needs_data and not batches:
        raise CalibrationError(
            "score", f"method {method!r} needs calibration batches", fix="pass calibration=, or method='magnitude'"
        )
    if importance.needs_labels and all(b.labels is None for b in batches):
        raise CalibrationError(
            "score",
            f"method {method!r} needs labels",
            got="batches without labels",
            fix="add labels to the batches, or use method='obs' or 'fisher'",
        )
    check_weights(graph)
    rankings = importance.compute()(graph, groups, batches, seed, progress or (lambda done, of: None))
    check_rankings(rankings)
    return dict(rankings)


def check_rankings(rankings: Mapping[str, Ranking]) -> None:
    """Refuse losses that are not finite.

    Raises:
        CalibrationError: names the group.
    """
    for name, ranking in rankings.items():
        if not all(math.isfinite(loss) for loss in ranking.losses):
            raise CalibrationError(
                "score",
                f"the scores of {name} are not finite",
                fix="look for NaN or infinity in the model's weights or the calibration data",
            )


def _from(module: str, function: str, needs_data: bool = True, needs_labels: bool = False) -> Importance:
    """An importance in a module of this package, imported when it is asked for."""
    return Importance(
        needs_data, needs_labels, lambda: getattr(importlib.import_module(f"tilecut_passes.{module}"), function)
    )


IMPORTANCES: dict[str, Importance] = {
    "obs": _from("score_surgeon", "score_surgeon"),
    "fisher": _from("score_gates", "score_fisher"),
    "fisher_block": _from("score_gates", "score_fisher_block"),
    "taylor": _from("score_gates", "score_taylor", needs_labels=True),
    "magnitude": _from("score_weights", "score_magnitude", needs_data=False),
    "magnitude_l1": _from("score_weights", "score_magnitude_l1", needs_data=False),
    "wanda": _from("score_activations", "score_wanda"),
    "flap": _from("score_activations", "score_flap"),
    "reap": _from("score_activations", "score_reap"),
    "attention": _from("score_attention", "score_attention"),
    "sensitivity": _from("score_sensitivity", "score_sensitivity"),
}
