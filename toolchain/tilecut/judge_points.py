"""What the points of an exploration are compared by: one cost, one quality; then their front and its knee.

The cost is measured milliseconds where the artifacts were timed, else the target's prediction, else MACs. The quality is
on held-out data: of a causal language model perplexity, of a classifier with labels accuracy, else the mean cosine to the
dense model's outputs; or what the caller names. Perplexity enters as its logarithm, which is what adds up over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilecut.find_front import find_front, find_knee
from tilecut_passes.align_labels import LOGITS
from tilecut_runtime.errors import ConfigError

DENSE = "dense"


@dataclass
class Point:
    """A budget and what came of it; `why` says why nothing did. The dense model is a point with no budget.

    Attributes:
        kept: group -> units, padding included.
        predicted_ms: by the target's cost model.
        fidelity: as in an artifact's report.
        artifact: the folder within the exploration's own.
    """

    name: str
    budget: dict[str, float]
    why: str | None = None
    macs: int | None = None
    parameters: int | None = None
    bytes: int | None = None
    kept: dict[str, int] = field(default_factory=dict)
    predicted_loss: float | None = None
    predicted_ms: float | None = None
    measured: dict[str, float] | None = None
    fidelity: dict[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cost: float | None = None
    quality: float | None = None


@dataclass(frozen=True)
class Quality:
    """A figure of fidelity: where it stands, and as a score, of which more is better."""

    label: str
    better: str
    read: Callable[[Mapping[str, Any]], float | None]
    score: Callable[[float], float]


def _cosine(fidelity: Mapping[str, Any]) -> float | None:
    found = [one["cosine"] for name, one in fidelity.items() if name not in ("task", "general")]
    return sum(found) / len(found) if found else None


def _task(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda fidelity: fidelity.get("task", {}).get(name)


QUALITIES = {
    "cosine": Quality("mean cosine to the dense outputs", "higher", _cosine, float),
    "accuracy": Quality("accuracy", "higher", _task("pruned_accuracy"), float),
    "perplexity": Quality("perplexity", "lower", _task("pruned_perplexity"), lambda p: -math.log(p)),
    "loss": Quality("loss of the labels", "lower", _task("pruned_loss"), lambda x: -x),
    "kl": Quality("KL divergence of the logits from the dense ones", "lower", _task("kl"), lambda x: -x),
}


def choose_quality(wanted: str | None, fidelity: Mapping[str, Any]) -> str:
    """The name of the quality to go by.

    Raises:
        ConfigError: the data have not what it needs.
    """
    usual = ["perplexity", *(["accuracy"] if LOGITS in fidelity else []), "cosine"]
    ordered = usual if wanted is None else [wanted]
    there = [name for name, one in QUALITIES.items() if one.read(fidelity) is not None]
    found = next((name for name in ordered if name in there), None)
    if found is None:
        raise ConfigError(
            "explore", "the model and the held-out data have no such quality", got=repr(wanted), wanted=" or ".join(there)
        )
    return found


def choose_cost(points: Sequence[Point], threads: int, target: str, calculated: bool = False) -> dict[str, Any]:
    """The name of the cost to go by, its label, and why it is not milliseconds.

    calculated: the target's cost model was not measured.
    """
    reached = [p for p in points if p.why is None]
    clock = "CPU" if threads == 1 else "wall"
    if all(p.measured is not None for p in reached):
        return {"name": "measured_ms", "label": f"milliseconds, measured ({clock} time)", "why": None}
    if all(p.predicted_ms is not None for p in reached):
        label = "milliseconds, calculated" if calculated else f"milliseconds, predicted ({clock} time)"
        return {"name": "predicted_ms", "label": label, "why": None}
    return {"name": "macs", "label": "MACs", "why": f"the {target} target has no latency model"}


def judge(points: Sequence[Point], cost: str, quality: str, threads: int) -> tuple[list[str], str | None]:
    """Fill in `cost` and `quality` of the points; returns the names on the front, cheapest first, and the knee's."""
    measure = QUALITIES[quality]
    clock = "cpu_ms" if threads == 1 else "wall_ms"
    scored = []
    for p in points:
        if p.why is not None:
            continue
        p.cost = (p.measured or {})[clock] if cost == "measured_ms" else getattr(p, cost)
        p.quality = measure.read(p.fidelity)
        assert p.cost is not None and p.quality is not None
        scored.append((p.name, (p.cost, measure.score(p.quality))))
    front = [scored[i] for i in find_front([at for _, at in scored])]
    knee = find_knee([at for _, at in front])
    return [name for name, _ in front], front[knee][0] if knee is not None else None
