"""Execute a GE model (.air) on the CPU, operator by operator in torch: what its graph means, without CANN.

`OPERATORS` is a table: type -> function of the operator's inputs (None where one is left out) and its attributes. Products
of matrices are summed in float32 and rounded to the type of their inputs, as the cube unit has it; the fused attention is
`infer_attention` of tilecut_runtime.npu_attention, norms and rotary embeddings are those of npu_norms.

Source of the meanings: CANN operator specification (the operators' REG_OP comments, as torchair repeats them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilecut_runtime.errors import LoweringError
from tilecut_runtime.npu_attention import infer_attention
from tilecut_runtime.npu_norms import MODES, rms_norm, rotary_mul
from tilecut_targets.ascend.read_air import DTYPES, Operator

Attributes = Mapping[str, Any]
# ge.DataType as attributes name it (graph/types.h), which is not the enumeration of the message.
ATTRIBUTE_DTYPES = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    9: torch.int64,
    11: torch.float64,
    12: torch.bool,
    27: torch.bfloat16,
}


def evaluate_air(operators: Sequence[Operator], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The model's outputs in their order; `inputs` by the names of its Data operators.

    Raises:
        LoweringError: an operator that the table does not have, or one that its inputs do not fit.
    """
    values: dict[str, Tensor | None] = {"": None}
    for op in operators:
        given = [values[name] for name in op.inputs]
        if op.type == "NetOutput":
            return [one for one in given if one is not None]
        if op.type == "Data":
            values[f"{op.name}:0"] = inputs[op.name]
            continue
        run = OPERATORS.get(op.type)
        if run is None:
            raise LoweringError(
                f"evaluate_air: {op.name}",
                "an operator that the evaluator does not know",
                got=op.type,
                fix="add it to OPERATORS in evaluate_air.py",
            )
        try:
            made = run(given, op.attributes)
        except (RuntimeError, TypeError, KeyError, IndexError, ValueError) as e:
            raise LoweringError(f"evaluate_air: {op.name}", f"{op.type} cannot be computed ({e})") from e
        for i, one in enumerate(made if isinstance(made, tuple | list) else [made]):
            values[f"{op.name}:{i}"] = one
    raise LoweringError("evaluate_air", "the graph has no NetOutput")


def _numbers(x: Tensor) -> list[int]:
    return [int(n) for n in x.flatten()]


def _bool(a: Attributes, name: str, default: bool = False) -> bool:
    return bool(a.get(name, default))


def _matmul(x: list, a: Attributes) -> Tensor:
    """MatMul, MatMulV2, BatchMatMul: attributes transpose_x1 and adj_x1 both swap the last two dimensions."""
    left, right, bias = x[0], x[1], x[2] if len(x) > 2 else None
    if _bool(a, "transpose_x1") or _bool(a, "adj_x1"):
        left = left.transpose(-1, -2)
    if _bool(a, "transpose_x2") or _bool(a, "adj_x2"):
        right = right.transpose(-1, -2)
    out = left.float() @ right.float()
    return (out if bias is None else out + bias.float()).to(x[0].dtype)


def _layer_norm(x: list, a: Attributes) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNormV4(x, normalized_shape, gamma, beta)."""
    shape = _numbers(x[1])
    out, mean, rstd = torch.native_layer_norm(x[0].float(), shape, x[2].float(), x[3].float(), a["epsilon"])
    return out.to(x[0].dtype), mean, rstd


def _rotary(x: list, a: Attributes) -> Tensor:
    """RotaryPositionEmbedding(x, cos, sin, rotate): mode 0 pairs halves, 1 neighbours; rotate is not used by tilecut."""
    if len(x) > 3 and x[3] is not None:
        raise ValueError("an input besides x, cos and sin")
    return rotary_mul(x[0], x[1], x[2], MODES[a.get("mode", 0)])


def _index(x: list, a: Attributes) -> Tensor:
    """IndexByTensor(x, indices): `indices_mask` says for every dimension whether it has one."""
    given = iter(x[1:])
    places = [next(given).long() if held else slice(None) for held in a["indices_mask"]]
    return x[0][tuple(places)]


def _gather(x: list, a: Attributes) -> Tensor:
    """GatherV2(x, indices, axis), and Gather(x, indices) along the first dimension."""
    if a.get("batch_dims", 0):
        raise ValueError("batch_dims")
    axis = _numbers(x[2])[0] if len(x) > 2 else 0
    table, index = x[0], x[1].long()
    if axis < 0:
        axis += table.ndim
    taken = table.index_select(axis, index.flatten())
    return taken.reshape([*table.shape[:axis], *index.shape, *table.shape[axis + 1 :]])


def _slice(x: list, a: Attributes) -> Tensor:
    """StridedSliceV2(x, begin, end, axes, strides); its masks are not used by torchair."""
    if any(a.get(name, 0) for name in ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")):
        raise ValueError("masks")
    begin, end = _numbers(x[1]), _numbers(x[2])
    axes = range(len(begin)) if len(x) < 4 or x[3] is None else _numbers(x[3])
    steps = [1] * len(begin) if len(x) < 5 or x[4] is None else _numbers(x[4])
    out = x[0]
    for axis, first, last, step in zip(axes, begin, end, steps, strict=True):
        out = torch.ops.aten.slice.Tensor(out, axis, first, last, step)
    return out


def _reduce(function: Callable[..., Tensor]) -> Callable[[list, Attributes], Tensor]:
    def run(x: list, a: Attributes) -> Tensor:
        axes = _numbers(x[1])
        if not axes and _bool(a, "noop_with_empty_axes", True):
            return x[0]
        return function(x[0].float() if x[0].is_floating_point() else x[0], axes, _bool(a, "keep_dims")).to(x[0].dtype)

    return run


def _attention(x: list, a: Attributes) -> Tensor:
    """FusedInferAttentionScore: query, key, value, pse_shift, atten_mask, and 22 inputs that are left out."""
    if any(one is not None for one in (x[3], *x[5:])):
        raise ValueError("an input besides query, key, value and atten_mask")
    return infer_attention(
        x[0],
        x[1],
        x[2],
        x[4],
        num_heads=a["num_heads"],
        num_key_value_heads=a["num_key_value_heads"],
        scale=a["scale"],
        input_layout=a["input_layout"].decode(),
        sparse_mode=a["sparse_mode"],
        pre_tokens=a["pre_tokens"],
        next_tokens=a["next_tokens"],
    )


def _split(x: list, a: Attributes) -> list[Tensor]:
    """SplitV(x, size_splits, split_dim)."""
    sizes, axis = _numbers(x[1]), _numbers(x[2])[0]
    # One of them may be -1: what is left.
    rest = x[0].shape[axis] - sum(n for n in sizes if n >= 0)
    return list(torch.split(x[0], [rest if n < 0 else n for n in sizes], axis))


def _unsqueeze(x: list, a: Attributes) -> Tensor:
    out = x[0]
    for axis in sorted(a["axes"]):
        out = out.unsqueeze(axis)
    return out


def _squeeze(x: list, a: Attributes) -> Tensor:
    return x[0].squeeze(tuple(a["axis"])) if a.get("axis") else x[0].squeeze()


def _cumsum(x: list, a: Attributes) -> Tensor:
    if _bool(a, "exclusive") or _bool(a, "reverse"):
        raise ValueError("exclusive or reverse")
    return torch.cumsum(x[0], _numbers(x[1])[0]).to(x[0].dtype)


def _softmax(x: list, a: Attributes) -> Tensor:
    return torch.softmax(x[0].float(), next(iter(a["axes"]))).to(x[0].dtype)


def _pack(x: list, a: Attributes) -> Tensor:
    """Numbers of one and no dimension are packed alike: a size is a scalar."""
    return torch.stack([one.reshape(()) if one.numel() == 1 and one.ndim <= 1 else one for one in x], a["axis"])


def _range(x: list, a: Attributes) -> Tensor:
    start, limit, step = (one.item() for one in x)
    return torch.arange(start, limit, step, dtype=x[0].dtype)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list, Attributes], Tensor]:
    return lambda x, a: function(x[0], x[1])


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[list, Attributes], Tensor]:
    return lambda x, a: function(x[0])


OPERATORS: dict[str, Callable[[list, Attributes], Any]] = {
    "Const": lambda x, a: a["value"],
    "FusedInferAttentionScore": _attention,
    # Products and norms.
    **dict.fromkeys(("MatMul", "MatMulV2", "BatchMatMul", "BatchMatMulV2"), _matmul),
    "LayerNormV4": _layer_norm,
    "RmsNorm": lambda x, a: rms_norm(x[0], x[1], a["epsilon"]),
    "RotaryMul": lambda x, a: rotary_mul(*x),
    "RotaryPositionEmbedding": _rotary,
    "SoftmaxV2": _softmax,
    # Arithmetic.
    "Add": _binary(torch.add),
    "AddV2": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "RealDiv": _binary(torch.div),
    "Div": _binary(lambda p, q: torch.div(p, q) if p.is_floating_point() else torch.div(p, q, rounding_mode="floor")),
    "FloorDiv": _binary(lambda p, q: torch.div(p, q, rounding_mode="floor")),
    "FloorMod": _binary(torch.remainder),
    "Pow": _binary(torch.pow),
    "ClipByValueV2": lambda x, a: torch.clamp(x[0], x[1], x[2]),
    "Maximum": _binary(torch.maximum),
    "Minimum": _binary(torch.minimum),
    "Neg": _unary(torch.neg),
    "Abs": _unary(torch.abs),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Rsqrt": _unary(torch.rsqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Cos": _unary(torch.cos),
    "Sin": _unary(torch.sin),
    "Erf": _unary(torch.erf),
    "Tanh": _unary(torch.tanh),
    "Sigmoid": _unary(torch.sigmoid),
    "Relu": _unary(torch.relu),
    "Swish": lambda x, a: x[0] * torch.sigmoid(a.get("scale", 1.0) * x[0]),
    "GeluV2": lambda x, a: torch.nn.functional.gelu(x[0], approximate=a.get("approximate", b"none").decode()),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "Cumsum": _cumsum,
    # Comparisons and choices.
    "Equal": _binary(torch.eq),
    "NotEqual": _binary(torch.ne),
    "Less": _binary(torch.lt),
    "LessEqual": _binary(torch.le),
    "Greater": _binary(torch.gt),
    "GreaterEqual": _binary(torch.ge),
    "LogicalAnd": _binary(torch.logical_and),
    "LogicalOr": _binary(torch.logical_or),
    "LogicalNot": _unary(torch.logical_not),
    "SelectV2": lambda x, a: torch.where(x[0].bool(), x[1], x[2]),
    "MaskedFill": lambda x, a: torch.where(x[1].bool(), x[2].to(x[0].dtype), x[0]),
    # Shapes and places.
    "Shape": lambda x, a: torch.tensor(x[0].shape, dtype=ATTRIBUTE_DTYPES[a.get("dtype", 3)]),
    "Cast": lambda x, a: x[0].to(ATTRIBUTE_DTYPES[a["dst_type"]]),
    "Identity": _unary(lambda x: x),
    "TensorMove": _unary(torch.clone),
    "Reshape": lambda x, a: x[0].reshape(_numbers(x[1])),
    "Transpose": lambda x, a: x[0].permute(_numbers(x[1])),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "BroadcastTo": lambda x, a: x[0].broadcast_to(_numbers(x[1])),
    "Expand": lambda x, a: x[0].expand(_numbers(x[1])),
    "Tile": lambda x, a: x[0].tile(_numbers(x[1])),
    "ConcatV2": lambda x, a: torch.cat(x[:-1], _numbers(x[-1])[0]),
    "ConcatD": lambda x, a: torch.cat(x, a["concat_dim"]),
    "Pack": _pack,
    "SplitV": _split,
    "Gather": _gather,
    "GatherV2": _gather,
    "GatherElements": lambda x, a: torch.gather(x[0], a.get("dim", 0), x[1].long()),
    "IndexByTensor": _index,
    "StridedSliceV2": _slice,
    "Range": _range,
    "Fill": lambda x, a: torch.full(_numbers(x[0]), x[1].item(), dtype=x[1].dtype),
    "ZerosLike": _unary(torch.zeros_like),
    "OnesLike": _unary(torch.ones_like),
}
assert set(ATTRIBUTE_DTYPES.values()) == set(DTYPES.values())
