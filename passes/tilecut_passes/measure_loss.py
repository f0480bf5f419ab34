"""The loss whose gradients importances read: the task's own, or the distance to the dense model's outputs.

Without labels the loss is half the squared distance to the dense outputs. Its gradient vanishes at the dense model, so
what is wanted is its Gauss-Newton curvature J^T J; random probes v of the outputs estimate it without bias, since
E_v[(d <v, y> / dx)^2] = diag(J^T J) for independent v of unit variance (Hutchinson).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tilecut_passes.align_labels import IGNORED, check_labels, scored_output
from tilecut_passes.calibration import Batch
from tilecut_runtime.errors import CalibrationError


def measure_loss(outputs: Mapping[str, Tensor], batch: Batch, generator: torch.Generator) -> Tensor:
    """A scalar whose squared gradients are Fisher information: from labels where there are any, else from a probe."""
    return task_loss(outputs, batch.labels) if batch.labels is not None else probe_loss(outputs, batch, generator)


def task_loss(outputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Cross entropy for integer labels (-100 is ignored), mean squared error for floating ones.

    Labels are aligned with the output `logits`, or with the first one: [B] to [B, C], [B, S] to [B, S, C].

    Raises:
        CalibrationError: labels of another shape, or outside the classes.
    """
    name = scored_output(tuple(outputs))
    logits = outputs[name]
    check_labels(labels, name, logits.shape)
    if labels.is_floating_point():
        return F.mse_loss(logits.reshape(labels.shape).float(), labels.float())
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten().long(), ignore_index=IGNORED)


def probe_loss(outputs: Mapping[str, Tensor], batch: Batch, generator: torch.Generator) -> Tensor:
    """A random projection of the floating outputs, each relative to its own magnitude, padding left out."""
    terms = []
    for value in outputs.values():
        if not value.is_floating_point():
            continue
        probe = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        valid = batch.valid(value)
        if valid is not None:
            probe = probe * valid.reshape(*valid.shape, *[1] * (value.ndim - valid.ndim)).to(probe.dtype)
        terms.append((value * probe).sum() / value.detach().norm().clamp_min(1e-12))
    if not terms:
        raise CalibrationError("score", "the model has no floating output to measure a distance on")
    return torch.stack(terms).sum()
