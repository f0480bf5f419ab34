"""`aten.sort.stable` in ONNX: TopK of everything, which gives the lower of two equal numbers' indices first."""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import opset20

# Its signatures speak of numpy's types; here the arguments are symbolic.
op: Any = opset20


def translate_sort(x, *, stable=True, dim=-1, descending=False):
    """x [..] -> values and indices of the same shape, sorted along `dim`."""
    axis = dim % len(x.shape)
    count = op.Shape(x, start=axis, end=axis + 1)
    return op.TopK(x, count, axis=axis, largest=int(descending), sorted=1)


TRANSLATIONS = {torch.ops.aten.sort.stable: translate_sort}
