"""How near a pruned graph stays to its dense one, on batches that it was not fitted with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.measure_loss import task_loss


def measure_fidelity(
    dense: Graph,
    pruned: Graph,
    batches: Sequence[Batch],
    cut: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
) -> dict[str, Any]:
    """Mean cosine and relative error of every floating output; with labels, loss and accuracy of both models too.

    `cut` makes the dense model's inputs and outputs those of the pruned one (see `as_cut`).

    Padded positions do not count. Cosine is over the last dimension, averaged over rows.
    """
    cosine: dict[str, list[torch.Tensor]] = {}
    squared: dict[str, list[float]] = {}
    task: dict[str, list[float]] = {}
    for batch in batches:
        want, got = cut(dense.run(batch.inputs)), pruned.run(cut(batch.inputs))
        for name, a in want.items():
            if not a.is_floating_point() or a.ndim == 0:
                continue
            x, y = batch.rows(a).double(), batch.rows(got[name]).double()
            cosine.setdefault(name, []).append(torch.nn.functional.cosine_similarity(x, y, dim=-1))
            held = squared.setdefault(name, [0.0, 0.0])
            held[0] += float((x - y).square().sum())
            held[1] += float(x.square().sum())
        if batch.labels is not None:
            for which, out in (("dense", want), ("pruned", got)):
                task.setdefault(f"{which}_loss", []).append(float(task_loss(out, batch.labels)))
                name = "logits" if "logits" in out else next(iter(out))
                if not batch.labels.is_floating_point():
                    counted = batch.labels != -100
                    right = (out[name].argmax(-1) == batch.labels)[counted]
                    task.setdefault(f"{which}_accuracy", []).append(float(right.float().mean()))
    result: dict[str, Any] = {
        name: {
            "cosine": round(float(torch.cat(rows).mean()), 6),
            "relative_error": round((squared[name][0] / max(squared[name][1], 1e-30)) ** 0.5, 6),
        }
        for name, rows in cosine.items()
    }
    if task:
        result["task"] = {k: round(sum(v) / len(v), 6) for k, v in task.items()}
    return result
