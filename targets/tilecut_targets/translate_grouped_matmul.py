"""`tilecut::grouped_matmul` in ONNX: each expert's rows are sliced out and multiplied, then joined again."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20

from tilecut_runtime import grouped_matmul as _grouped_matmul_op

assert _grouped_matmul_op

# Its signatures speak of numpy's types; here the arguments are symbolic.
op: Any = opset20


def translate_grouped_matmul(x, weight, ends):
    """x [T, I], weight [E, I, O], ends [E] -> [T, O]; the number of experts is static, that of their rows is not."""
    first = op.Constant(value_ints=[0])
    bounds = op.Concat(first, op.Cast(ends, to=ir.DataType.INT64), axis=0)
    parts = []
    for e in range(int(weight.shape[0])):
        at = [op.Constant(value_ints=[e + i]) for i in range(3)]
        low, high = (op.Slice(bounds, at[i], at[i + 1], first) for i in (0, 1))
        parts.append(op.MatMul(op.Slice(x, low, high, first), op.Gather(weight, op.Constant(value_int=e), axis=0)))
    return op.Concat(*parts, axis=0)


TRANSLATIONS = {torch.ops.tilecut.grouped_matmul.default: translate_grouped_matmul}
