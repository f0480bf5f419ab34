"""Labels as the loss wants them: of a shape and range that the output takes, and each beside the output that predicts it.

A loss compares labels with the output `logits`, or with the first one: integers [..] with [.., C], floating ones number
by number. The labels of a causal language model, as data collators make them, repeat the input ids (-100 where nothing
counts); they are moved one place to the left, so that position i holds the id that it has to predict. Labels of masked
language models differ from the ids at the places that were masked, and stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tilecut_runtime.errors import CalibrationError

IGNORED = -100
# The output that holds unnormalised log-probabilities, by the name that transformers gives it.
LOGITS = "logits"


def scored_output(outputs: Sequence[str]) -> str:
    """The output that labels belong to."""
    return LOGITS if LOGITS in outputs else outputs[0]


def check_labels(labels: Tensor, name: str, shape: Sequence[int], where: str = "labels") -> None:
    """Refuse labels that the output `name` of that shape cannot be compared with.

    Raises:
        CalibrationError: another shape, or a class that the output lacks.
    """
    shape = list(shape)
    if labels.is_floating_point():
        # A mean squared error forgives a last dimension of one.
        if [n for n in labels.shape if n != 1] != [n for n in shape if n != 1]:
            raise CalibrationError(
                where,
                "they do not fit the output",
                got=list(labels.shape),
                wanted=f"the shape of {name}, {shape}",
            )
        if not labels.isfinite().all():
            raise CalibrationError(where, "they hold NaN or infinity")
        return
    if list(labels.shape) != shape[:-1]:
        raise CalibrationError(
            where,
            "they do not fit the output",
            got=list(labels.shape),
            wanted=f"{shape[:-1]}, one for each row of {name} {shape}",
        )
    counted = labels[labels != IGNORED]
    if counted.numel() and (int(counted.max()) >= shape[-1] or int(counted.min()) < 0):
        raise CalibrationError(
            where,
            "a label is outside the classes",
            got=f"{int(counted.min())}..{int(counted.max())}",
            wanted=f"0..{shape[-1] - 1}, or {IGNORED} to ignore",
        )


def align_labels(labels: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Labels that repeat the input ids, moved to the position that predicts them; others as they are."""
    ids = inputs.get("input_ids")
    if ids is None or labels.is_floating_point() or labels.shape != ids.shape or labels.ndim != 2:
        return labels
    counted = labels != IGNORED
    if not counted.any() or not torch.equal(labels[counted], ids[counted].to(labels.dtype)):
        return labels
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORED)
    return next_tokens(labels)


def next_tokens(ids: Tensor) -> Tensor:
    """Ids [B, S] as labels of a causal language model: the next one at each position, nothing at the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)
