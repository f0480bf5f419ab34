"""CANN's PromptFlashAttention as ONNX: the node that ATC reads, and a function of the same name that says what it means.

The verify twin is the very file that ATC gets, plus a model-local function `npu::NPUPromptFlashAttention` in standard
ops, so that onnxruntime executes it. In this op the mask's True means drop, the opposite of torch's.

Specification: CANN operator library, PromptFlashAttention (aclnnPromptFlashAttention).
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

DOMAIN, OP = "npu", "NPUPromptFlashAttention"
# What "no limit" is called in pre_tokens and next_tokens; left out, they would be 0.
ALL_TOKENS = 2147483647
ONNX_OPSET = 19
# Finite in fp32, and small enough that exp() of it is 0 beside any visible score.
NEGATIVE = -1e30
ATTRIBUTES = (
    "num_heads",
    "scale_value",
    "pre_tokens",
    "next_tokens",
    "input_layout",
    "num_key_value_heads",
    "sparse_mode",
    "inner_precise",
)


def prompt_flash_attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, *, scale: float, causal: str, always_mask: bool
) -> Tensor:
    """q [B, N, Sq, D], k and v [B, Nk, Sk, D], key_padding bool [B, Sk] (True keeps) -> [B, N, Sq, D] through fp16."""
    sq, sk = q.shape[2], k.shape[2]
    drop = torch.zeros(1, 1, sq, sk, dtype=torch.bool, device=q.device) if always_mask else None
    if causal != "none":
        shift = 0 if causal == "top_left" else sk - sq
        rows, columns = torch.arange(sq, device=q.device)[:, None] + shift, torch.arange(sk, device=q.device)[None, :]
        drop = (columns > rows)[None, None]
    if key_padding is not None:
        padded = ~key_padding[:, None, None, :].expand(-1, 1, sq, -1)
        drop = padded if drop is None else drop | padded
    if drop is not None:
        drop = drop.expand(q.shape[0], 1, sq, sk)
    # pse_shift stays empty: a mask must be the fifth input.
    inputs = (q.half(), k.half(), v.half()) if drop is None else (q.half(), k.half(), v.half(), None, drop)
    attrs = {
        "num_heads": int(q.shape[1]),
        "scale_value": scale,
        "pre_tokens": ALL_TOKENS,
        "next_tokens": ALL_TOKENS,
        "input_layout": "BNSD",
        "num_key_value_heads": int(k.shape[1]),
        "sparse_mode": 0,
        "inner_precise": 0,
    }
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OP}", inputs, attrs=attrs, dtype=torch.float16, shape=(*q.shape[:3], v.shape[3]), version=1
    )
    return out.to(q.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """gelu in ops that operator set 19 has."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + torch.erf(x * 0.7071067811865476))


def reference_function(has_mask: bool) -> onnx.FunctionProto:
    """What the node means, layout BNSD, sparse_mode 0: softmax(scale q k^T, dropped pairs left out) v, in fp32."""
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(name: str, value: object, dtype: type = np.int64) -> str:
        return add("Constant", [], name, value=onnx.numpy_helper.from_array(np.array(value, dtype)))

    def attribute(name: str, of: str, kind: int, field: str) -> str:
        node = helper.make_node("Constant", [], [name])
        reference = onnx.AttributeProto(name=field, ref_attr_name=of, type=cast(Any, kind))
        node.attribute.append(reference)
        nodes.append(node)
        return name

    heads = add(
        "Unsqueeze",
        [attribute("num_heads_value", "num_heads", onnx.AttributeProto.INT, "value_int"), constant("axis0", [0])],
        "n",
    )
    kv_heads = add(
        "Unsqueeze",
        [attribute("num_kv_value", "num_key_value_heads", onnx.AttributeProto.INT, "value_int"), "axis0"],
        "nk",
    )
    scale = attribute("scale", "scale_value", onnx.AttributeProto.FLOAT, "value_float")
    for name in ("query", "key", "value"):
        add("Cast", [name], f"{name}_wide", to=TensorProto.FLOAT)
    add("Shape", ["query_wide"], "query_shape")
    add("Shape", ["key_wide"], "key_shape")
    for name, shape, index in (
        ("b", "query_shape", 0),
        ("sq", "query_shape", 2),
        ("d", "query_shape", 3),
        ("sk", "key_shape", 2),
    ):
        add("Gather", [shape, constant(f"index_{name}", [index])], name, axis=0)
    rest = constant("rest", [-1])
    # The query heads of one KV head stand together: [B, Nk, (N / Nk) * Sq, D].
    add("Reshape", ["query_wide", add("Concat", ["b", kv_heads, rest, "d"], "grouped_shape", axis=0)], "query_grouped")
    add("Transpose", ["key_wide"], "key_transposed", perm=[0, 1, 3, 2])
    add("Mul", [add("MatMul", ["query_grouped", "key_transposed"], "products"), scale], "scaled")
    scores = add("Reshape", ["scaled", add("Concat", ["b", heads, "sq", "sk"], "score_shape", axis=0)], "scores")
    if has_mask:
        scores = add("Where", ["atten_mask", constant("negative", NEGATIVE, np.float32), scores], "masked")
    add("Softmax", [scores], "weights", axis=-1)
    add("Reshape", ["weights", add("Concat", ["b", kv_heads, rest, "sk"], "weights_shape", axis=0)], "weights_grouped")
    add("MatMul", ["weights_grouped", "value_wide"], "mixed")
    add("Reshape", ["mixed", add("Concat", ["b", heads, "sq", rest], "out_shape", axis=0)], "out_wide")
    add("CastLike", ["out_wide", "query"], "attention_out")
    inputs = ["query", "key", "value", "pse_shift", "atten_mask"] if has_mask else ["query", "key", "value"]
    return helper.make_function(
        DOMAIN, OP, inputs, ["attention_out"], nodes, [helper.make_opsetid("", ONNX_OPSET)], list(ATTRIBUTES)
    )
