"""CANN's PromptFlashAttention as ONNX: the node that ATC reads, and functions of the same name that say what it means.

The functions are for the verify twin (`make_twin.py`). A mask is read differently in every sparse_mode, so there is one for
each, told apart by the node's `overload`. In this op the mask's True means drop, the opposite of torch's.

Specification: CANN ops-transformer, aclnnPromptFlashAttentionV3 (meaning) and npu_prompt_flash_attention_onnx_plugin.cpp
(inputs by place, `INPUTS`; attributes; pre_tokens and next_tokens left out are 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from tilecut_targets.ascend.legality import ALL_TOKENS, family_row, op_row
from tilecut_targets.ascend.onnx_function import OnnxFunction
from tilecut_targets.window_bias import keys_behind, outside_window

DOMAIN, OP = "npu", "NPUPromptFlashAttention"
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
INPUTS = ("query", "key", "value", "pse_shift", "atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv")
UNMASKED, LENGTHS = "unmasked", "_lengths"


def hidden_pairs(
    q: Tensor,
    k: Tensor,
    key_padding: Tensor | None,
    hidden: Tensor | None,
    *,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
) -> Tensor:
    """The full mask, bool [B, 1, Sq, Sk], True drops.

    Args:
        q, k: [B, N, Sq, D] and [B, Nk, Sk, D].
        key_padding: bool [B, Sk], True keeps.
        hidden: bool [B|1, 1, Sq|1, Sk|1], True drops.
    """
    batch, sq, sk = q.shape[0], q.shape[2], k.shape[2]
    behind = keys_behind(q, k, causal)
    drop = outside_window(behind, window, global_tokens)
    if causal != "none":
        drop = drop | (behind < 0)
    drop = drop[None, None]
    if hidden is not None:
        drop = drop | hidden
    if key_padding is not None:
        drop = drop | ~key_padding[:, None, None, :]
    return drop.expand(batch, 1, sq, sk)


def triangle(size: int) -> Tensor:
    """The compressed mask, bool [size, size], True above the diagonal."""
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def prompt_flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None = None,
    *,
    scale: float,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    kv_heads: int,
    inner_precise: int,
    expand: bool,
) -> Tensor:
    """q [B, N, Sq, D], k and v [B, Nk, Sk, D], lengths of keys [B] -> [B, N, Sq, D] through fp16.

    The other arguments are `legality.Fused`'s.
    """
    if expand:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    inputs: list[Tensor | None] = [q.half(), k.half(), v.half()]
    # An input is known by its place: pse_shift stays empty, and so does actual_seq_lengths, since every query is computed.
    if mask is not None or lengths is not None:
        inputs += [None, mask]
    if lengths is not None:
        # The op takes no more than there are keys.
        inputs += [None, lengths.long().clamp(0, k.shape[2])]
    attrs = {
        "num_heads": int(q.shape[1]),
        "scale_value": scale,
        "pre_tokens": pre_tokens,
        "next_tokens": next_tokens,
        "input_layout": "BNSD",
        "num_key_value_heads": kv_heads,
        "sparse_mode": sparse_mode,
        "inner_precise": inner_precise,
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


def is_fused(node: onnx.NodeProto) -> bool:
    """Whether a node is the fused attention."""
    return (node.domain, node.op_type) == (DOMAIN, OP)


def overload_of(node: onnx.NodeProto) -> str:
    """Which function a node's meaning is."""
    mode = next(a.i for a in node.attribute if a.name == "sparse_mode")
    masked = len(node.input) > 3 and node.input[4] != ""
    return (f"sparse_mode_{mode}" if masked else UNMASKED) + (LENGTHS if len(node.input) > 5 else "")


def illegal(node: onnx.NodeProto, family: str) -> str | None:
    """What a node of the file breaks of the op's row in the legality table, or None."""
    op = OP.removeprefix("NPU")
    if op not in family_row(family)["onnx"].values():
        return f"{node.name}: {family} has no {op} in ONNX"
    row = op_row(op, family)
    held = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if missing := [name for name in ATTRIBUTES if name not in held]:
        # ATC takes 0 for those that are left out, and 1.0 for the scale.
        return f"{node.name}: no {', '.join(missing)}"
    kv_heads = held["num_key_value_heads"]
    masked = len(node.input) > 3 and node.input[4] != ""
    rules = {
        "3, 5 or 7 inputs": len(node.input) in (3, 5, 7),
        "pse_shift and the lengths of queries, which stay empty": not any([*node.input[3:4], *node.input[5:6]]),
        "the lengths of keys": len(node.input) < 7 or row["actual_lengths"],
        "the layout": held["input_layout"].decode() in row["layouts"],
        "the number of heads": 1 <= held["num_heads"] <= row["heads"],
        "the heads of one KV head": kv_heads == 0
        or (held["num_heads"] % kv_heads == 0 and held["num_heads"] <= row["ratio"] * kv_heads),
        "num_key_value_heads 0": kv_heads == 0 or not row.get("zero_kv_heads"),
        "the sparse mode": held["sparse_mode"] in row["sparse_modes"],
        "a mask in sparse modes": held["sparse_mode"] == 0 or masked,
        "pre_tokens": row["any_pre_tokens"] or held["pre_tokens"] == ALL_TOKENS,
        "next_tokens": row["any_pre_tokens"] or held["next_tokens"] in (0, ALL_TOKENS),
    }
    broken = [name for name, holds in rules.items() if not holds]
    return f"{node.name}: {', '.join(broken)}" if broken else None


def reference_function(overload: str) -> onnx.FunctionProto:
    """What a node means in layout BNSD: softmax(scale q k^T, dropped pairs left out) v, in fp32.

    overload: "unmasked", or "sparse_mode_0", 2, 3 or 4; then "_lengths" where keys beyond actual_seq_lengths_kv are dropped.
    """
    function = OnnxFunction()
    add, constant = function.add, function.constant
    add("Unsqueeze", [function.attribute("num_heads_value", "num_heads"), constant("axis0", [0])], "n")
    add("Unsqueeze", [function.attribute("num_kv_value", "num_key_value_heads"), "axis0"], "kv_given")
    # 0 says that there are as many as query heads.
    add("Where", [add("Equal", ["kv_given", constant("zero", [0])], "none_given"), "n", "kv_given"], "nk")
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
    add("Reshape", ["query_wide", add("Concat", ["b", "nk", rest, "d"], "grouped_shape", axis=0)], "query_grouped")
    add("Transpose", ["key_wide"], "key_transposed", perm=[0, 1, 3, 2])
    scale = function.attribute("scale", "scale_value", onnx.AttributeProto.FLOAT, "value_float")
    add("Mul", [add("MatMul", ["query_grouped", "key_transposed"], "products"), scale], "scaled")
    scores = add("Reshape", ["scaled", add("Concat", ["b", "n", "sq", "sk"], "score_shape", axis=0)], "scores")
    masking = overload.removesuffix(LENGTHS)
    hidden = [] if masking == UNMASKED else [_hidden(function, int(masking.removeprefix("sparse_mode_")))]
    if overload.endswith(LENGTHS):
        hidden.append(_beyond_lengths(function))
    if hidden:
        hidden = hidden[0] if len(hidden) == 1 else add("Or", hidden, "hidden_or_beyond")
        scores = add("Where", [hidden, constant("negative", NEGATIVE, np.float32), scores], "masked")
    add("Softmax", [scores], "weights", axis=-1)
    add("Reshape", ["weights", add("Concat", ["b", "nk", rest, "sk"], "weights_shape", axis=0)], "weights_grouped")
    add("MatMul", ["weights_grouped", "value_wide"], "mixed")
    add("Reshape", ["mixed", add("Concat", ["b", "n", "sq", rest], "out_shape", axis=0)], "out_wide")
    add("CastLike", ["out_wide", "query"], "attention_out")
    inputs = INPUTS[: 7 if overload.endswith(LENGTHS) else 3 if overload == UNMASKED else 5]
    opsets = [helper.make_opsetid("", ONNX_OPSET)]
    made = helper.make_function(DOMAIN, OP, inputs, ["attention_out"], function.nodes, opsets, list(ATTRIBUTES))
    made.overload = overload
    return made


def _beyond_lengths(function: OnnxFunction) -> str:
    """The keys at and beyond the lengths: bool [B, 1, 1, Sk]."""
    add, constant = function.add, function.constant
    count = add("Squeeze", ["sk", "axis0"], "key_count")
    places = add("Range", [constant("first", 0), count, constant("one", 1)], "key_places")
    lengths = add("Unsqueeze", ["actual_seq_lengths_kv", constant("broadcast", [1, 2, 3])], "key_lengths")
    return add("GreaterOrEqual", [places, lengths], "beyond")


def _hidden(function: OnnxFunction, mode: int) -> str:
    """The pairs that are dropped: bool, broadcast to [B, N, Sq, Sk]."""
    add, constant = function.add, function.constant
    for name in ("sq", "sk"):
        add("Squeeze", [name, "axis0"], f"{name}_number")
    start, step = constant("start", 0), constant("step", 1)
    rows = add("Range", [start, "sq_number", step], "rows")
    columns = add("Range", [start, "sk_number", step], "columns")
    if mode in (3, 4):
        # Counted from the bottom right corner.
        rows = add("Add", [rows, add("Sub", ["sk", "sq"], "shift")], "shifted_rows")
    behind = add("Sub", [add("Unsqueeze", [rows, constant("axis1", [1])], "standing_rows"), columns], "behind")
    if mode in (2, 3):
        return add("Less", [behind, start], "hidden")
    before = add("Greater", [behind, function.attribute("pre", "pre_tokens")], "too_early")
    after = add("Greater", [add("Neg", [behind], "ahead"), function.attribute("next", "next_tokens")], "too_late")
    band = add("Or", [before, after], "outside")
    return band if mode == 4 else add("Or", ["atten_mask", band], "hidden")
