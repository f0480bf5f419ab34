"""How near a pruned graph stays to its dense one, on data that it was not fitted with.

Of every floating output: the mean cosine over the last dimension and the relative error. Of the task: with labels, loss
and accuracy of both models; for logits over classes, KL(dense || pruned); for a causal language model, the perplexity of
both on the next token. Padded positions do not count. Causal is what depends on no later token, tried on the first batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tilecut_passes.align_labels import IGNORED, LOGITS, next_tokens, scored_output
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.measure_loss import task_loss
from tilecut_runtime.reference import NUMBERS

# How far logits may move, relative to their magnitude, when a later token changes: rounding.
SAME = 1e-4


class Model(Protocol):
    """What is compared: a graph, or an artifact in a session."""

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name."""
        ...


def measure_fidelity(
    dense: Graph,
    pruned: Model,
    batches: Sequence[Batch],
    cut: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
    general: Sequence[Batch] = (),
) -> dict[str, Any]:
    """The figures on `batches`: a dict for each output, and `task`; those on general text under `general`.

    `cut` makes the dense model's inputs and outputs those of the pruned one (see `as_cut`).
    """
    result = _measure(dense, pruned, batches, cut)
    if general:
        result["general"] = dict(result) if general is batches else _measure(dense, pruned, general, cut)
    return result


class _Mean:
    """Means weighted by how many rows each batch has."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, total: float, count: int) -> None:
        held = self.sums.setdefault(name, [0.0, 0])
        held[0] += total
        held[1] += count

    def __getitem__(self, name: str) -> float:
        return self.sums[name][0] / max(self.sums[name][1], 1)


def _measure(
    dense: Graph,
    pruned: Model,
    batches: Sequence[Batch],
    cut: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Any]:
    cosine, task = _Mean(), _Mean()
    squared: dict[str, list[float]] = {}
    causal = bool(batches) and is_causal(dense, batches)
    for batch in batches:
        want, got = cut(dense.run(batch.inputs)), pruned.run(cut(batch.inputs))
        for name, a in want.items():
            if not a.is_floating_point() or a.ndim == 0:
                continue
            held = squared.setdefault(name, [0.0, 0.0])
            for x, y in _parts(batch.rows(a), batch.rows(got[name])):
                if name == LOGITS and x.shape[-1] > 1:
                    task.add("kl", float(_divergence(x, y)), len(x))
                # A banned class has -inf in both.
                banned = ~x.isfinite() & (x == y)
                x, y = x.masked_fill(banned, 0), y.masked_fill(banned, 0)
                cosine.add(name, float(F.cosine_similarity(x, y, dim=-1).sum()), len(x))
                held[0] += float((x - y).square().sum())
                held[1] += float(x.square().sum())
        for which, out in (("dense", want), ("pruned", got)):
            if batch.labels is not None:
                _add_labelled(task, which, out, batch.labels)
            if causal:
                _add_next_token(task, which, out[LOGITS], batch)
    result: dict[str, Any] = {
        name: {
            "cosine": round(cosine[name], 6),
            "relative_error": round((error / max(size, 1e-30)) ** 0.5, 6),
        }
        for name, (error, size) in squared.items()
    }
    if task.sums:
        result["task"] = {
            name: round(_perplexity(task[name]) if name.endswith("perplexity") else task[name], 6) for name in task.sums
        }
    return result


def _parts(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in float64, some at a time: the logits of a large vocabulary do not fit twice."""
    for a, b in zip(x.split(_rows(x)), y.split(_rows(x)), strict=True):
        yield a.double(), b.double()


def _rows(x: Tensor) -> int:
    return max(1, NUMBERS // max(1, x.shape[-1]))


def _divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """KL(dense || pruned), summed over rows; a logit of -inf in both models is a class that neither has."""
    p, q = dense.log_softmax(-1), pruned.log_softmax(-1)
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum()


def _add_labelled(task: _Mean, which: str, out: Mapping[str, Tensor], labels: Tensor) -> None:
    """Loss and, for classes, accuracy: means over labels that count."""
    floating = labels.is_floating_point()
    counted = labels != IGNORED if not floating else torch.ones_like(labels, dtype=torch.bool)
    number = int(counted.sum())
    task.add(f"{which}_loss", float(task_loss(out, labels)) * number, number)
    if not floating:
        right = (out[scored_output(tuple(out))].argmax(-1) == labels)[counted]
        task.add(f"{which}_accuracy", float(right.sum()), number)


def _add_next_token(task: _Mean, which: str, logits: Tensor, batch: Batch) -> None:
    """Cross entropy of the next token: the label that text has by nature."""
    ids, mask = batch.inputs["input_ids"], batch.mask
    if mask is not None:
        ids = ids.masked_fill(mask == 0, IGNORED)
    labels = next_tokens(ids)
    if mask is not None:
        # On the left of the first real token there is nothing to predict it from.
        labels = labels.masked_fill(mask == 0, IGNORED)
    counted = labels != IGNORED
    rows = _rows(logits)
    for x, wanted in zip(logits[counted].split(rows), labels[counted].split(rows), strict=True):
        task.add(f"{which}_perplexity", float(F.cross_entropy(x.double(), wanted, reduction="sum")), len(x))


def _perplexity(entropy: float) -> float:
    return math.exp(min(entropy, 700.0))


def is_causal(graph: Graph, batches: Sequence[Batch]) -> bool:
    """Whether `logits` [B, S, V] over the ids' vocabulary do not change when a later id does."""
    specs = {spec.name: spec for spec in graph.output_specs()}
    batch = next((b for b in batches if b.inputs.get("input_ids", torch.empty(0)).ndim == 2), None)
    if batch is None or LOGITS not in specs or len(specs[LOGITS].shape) != 3 or "decoder_input_ids" in graph.inputs:
        return False
    ids = batch.inputs["input_ids"]
    real = batch.mask if batch.mask is not None else torch.ones_like(ids)
    place = torch.arange(ids.shape[1])
    last = (place * (real != 0)).argmax(1)
    logits = graph.run(batch.inputs)[LOGITS]
    earlier = (real != 0) & (place < last[:, None])
    if logits.shape[:2] != ids.shape or int(ids.max()) >= logits.shape[-1] or not earlier.any():
        return False
    changed = ids.clone()
    changed[torch.arange(len(ids)), last] = (ids.gather(1, last[:, None])[:, 0] + 1) % logits.shape[-1]
    moved = graph.run({**batch.inputs, "input_ids": changed})[LOGITS]
    finite = logits[earlier].isfinite()
    difference = (moved[earlier] - logits[earlier])[finite].abs().max()
    return bool(difference <= SAME * logits[earlier][finite].abs().max())
