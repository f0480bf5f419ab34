"""CANN's RmsNorm and RotaryPositionEmbedding as ONNX: the nodes that ATC reads, and functions that say what they mean.

    npu::NPURmsNorm(x, gamma) -> y, rstd                 attribute epsilon, which ATC's reader ignores: it sets 1e-6
    npu::NPURotaryPositionEmbedding(x, cos, sin) -> y    attribute mode, 0 halves, 1 interleaved; layout BSND

The function of the first takes 1e-6 too, whatever its attribute says: it means what ATC makes of the node. torch_npu's
exporter writes NPURotaryMul for rotary embeddings, whose reader is not among the published sources.

Specification: CANN ops-nn, npu_rms_norm_onnx_plugin.cpp and aclnnRmsNorm; CANN ops-transformer,
npu_rotary_position_embedding_onnx_plugin.cpp and aclnnRotaryPositionEmbedding.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from tilecut_targets.ascend.legal_norms import HALF, INTERLEAVE
from tilecut_targets.ascend.legality import family_row, op_row
from tilecut_targets.ascend.npu_ops import DOMAIN, ONNX_OPSET
from tilecut_targets.ascend.onnx_function import OnnxFunction

RMS_NORM, ROTARY = "NPURmsNorm", "NPURotaryPositionEmbedding"
MODES = (HALF, INTERLEAVE)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The node, in x's type: x [.., H] normalised, times the weight [H] or ones."""
    gamma = x.new_ones(x.shape[-1]) if weight is None else weight
    made = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{RMS_NORM}",
        (x, gamma),
        attrs={"epsilon": eps},
        dtypes=(x.dtype, torch.float32),
        shapes=(x.shape, (*x.shape[:-1], 1)),
        version=1,
    )
    return made[0]


def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str, expand: bool) -> Tensor:
    """The node: x [B, S, N, D], cos and sin [B|1, S, 1, D]."""
    cos, sin = repeated(x, cos, sin) if expand else (cos, sin)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{ROTARY}", (x, cos, sin), attrs={"mode": MODES.index(mode)}, dtype=x.dtype, shape=x.shape, version=1
    )


def repeated(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of x's batch."""
    return cos.expand(x.shape[0], -1, -1, -1), sin.expand(x.shape[0], -1, -1, -1)


def is_norm(node: onnx.NodeProto) -> bool:
    """Whether a node is the fused norm."""
    return (node.domain, node.op_type) == (DOMAIN, RMS_NORM)


def is_rotary(node: onnx.NodeProto) -> bool:
    """Whether a node is the fused rotary embedding."""
    return (node.domain, node.op_type) == (DOMAIN, ROTARY)


def overload_of(node: onnx.NodeProto) -> str:
    """Which function a node's meaning is."""
    return MODES[_attributes(node)["mode"]] if is_rotary(node) else ""


def illegal(node: onnx.NodeProto, family: str) -> str | None:
    """What a norm or rotary embedding of the file breaks of its op's row in the legality table, or None."""
    held, op = _attributes(node), node.op_type.removeprefix("NPU")
    if op not in {family_row(family)[kind]["onnx"] for kind in ("norm", "rotary")}:
        return f"{node.name}: {family} has no {op} in ONNX"
    row = op_row(op, family)
    if is_norm(node):
        # Left out, it is what ATC's reader sets.
        eps = held.get("epsilon", row["onnx_epsilon"])
        rules = {
            "2 inputs and 2 outputs": (len(node.input), len(node.output)) == (2, 2),
            "the epsilon": np.float32(eps) == np.float32(row["onnx_epsilon"]),
        }
    else:
        rules = {
            "3 inputs and 1 output": (len(node.input), len(node.output)) == (3, 1),
            "the mode": held.get("mode") in [MODES.index(mode) for mode in row["modes"]],
        }
    broken = [name for name, holds in rules.items() if not holds]
    return f"{node.name}: {', '.join(broken)}" if broken else None


def _attributes(node: onnx.NodeProto) -> dict:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def rms_norm_function() -> onnx.FunctionProto:
    """x / sqrt(mean(x^2) + 1e-6) * gamma over the last dimension, in fp32; and 1 / sqrt(..)."""
    function = OnnxFunction()
    add = function.add
    for name in ("x", "gamma"):
        add("Cast", [name], f"{name}_wide", to=TensorProto.FLOAT)
    add("ReduceMean", [add("Mul", ["x_wide", "x_wide"], "squares"), function.constant("last", [-1])], "mean", keepdims=1)
    epsilon = function.constant("epsilon", op_row("RmsNorm", "any")["onnx_epsilon"], np.float32)
    add("Reciprocal", [add("Sqrt", [add("Add", ["mean", epsilon], "shifted")], "rms")], "rstd")
    scaled = add("Mul", [add("Mul", ["x_wide", "rstd"], "normalised"), "gamma_wide"], "scaled")
    add("CastLike", [scaled, "x"], "y")
    return _made(function, RMS_NORM, ["x", "gamma"], ["y", "rstd"], "epsilon")


def rotary_function(mode: str) -> onnx.FunctionProto:
    """x * cos + rotate(x) * sin, in fp32."""
    function = OnnxFunction()
    add = function.add
    for name in ("x", "cos", "sin"):
        add("Cast", [name], f"{name}_wide", to=TensorProto.FLOAT)
    x = "x_wide"
    if mode == INTERLEAVE:
        # 0 keeps a dimension.
        x = add("Reshape", [x, function.constant("paired_shape", [0, 0, 0, -1, 2])], "pairs")
    function.nodes.append(helper.make_node("Split", [x], ["first", "second"], axis=-1, num_outputs=2))
    rotated = add("Concat", [add("Neg", ["second"], "negated"), "first"], "turned", axis=-1)
    if mode == INTERLEAVE:
        rotated = add("Reshape", [rotated, function.constant("flat_shape", [0, 0, 0, -1])], "flat")
    parts = [add("Mul", ["x_wide", "cos_wide"], "straight"), add("Mul", [rotated, "sin_wide"], "crossed")]
    add("CastLike", [add("Add", parts, "sum"), "x"], "y")
    made = _made(function, ROTARY, ["x", "cos", "sin"], ["y"], "mode")
    made.overload = mode
    return made


def _made(function: OnnxFunction, op: str, inputs: list[str], outputs: list[str], attribute: str) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", ONNX_OPSET)]
    return helper.make_function(DOMAIN, op, inputs, outputs, function.nodes, opsets, [attribute])
