"""How far a changed model's outputs are from the dense one's: one number a batch, from which cost tables are made.

    labels        the task's own loss, minus the dense model's (`measure_loss.task_loss`)
    logits        KL(dense || changed) of the softmax over the last dimension, mean over positions
    other floats  half the squared distance, relative to the dense output's: the KL of unit Gaussians, in units of their
                  signal. Several outputs add up

Padded positions do not count.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from tilecut_passes.calibration import Batch
from tilecut_passes.measure_loss import task_loss

# The output that holds unnormalised log-probabilities, by the name that transformers gives it.
LOGITS = "logits"


def measure_divergence(dense: Mapping[str, Tensor], changed: Mapping[str, Tensor], batch: Batch) -> float:
    """The divergence of `changed` from `dense`, both the outputs of one batch."""
    if batch.labels is not None:
        return float(task_loss(changed, batch.labels) - task_loss(dense, batch.labels))
    terms = []
    for name, want in dense.items():
        if not want.is_floating_point() or want.ndim == 0:
            continue
        x, y = batch.rows(want).float(), batch.rows(changed[name]).float()
        if name == LOGITS and want.shape[-1] > 1:
            terms.append(float(F.kl_div(y.log_softmax(-1), x.log_softmax(-1), reduction="sum", log_target=True)) / len(x))
        else:
            terms.append(float((x - y).square().sum() / x.square().sum().clamp_min(1e-24)) / 2)
    return sum(terms)
