"""Rules for ops that sum a dimension away between two operands: linear, matmul, attention, convolution; and embedding.

The contracted dimensions of both operands are one, and the activation's side is recorded as a sink: multiplying it by
0 or 1 there is what removing units means.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from tilecut_passes.axes.axis import divide, regroup, unify
from tilecut_passes.axes.infer import Axes, NodeTypes, Types, broadcast, fresh
from tilecut_passes.graph import source, value_of

# Importing it registers tilecut::attention.
from tilecut_runtime import attention as _attention_op

aten = torch.ops.aten
assert _attention_op


def linear(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """[.., I] x [O, I] + [O] -> [.., O]."""
    x, w = axes.of[a["input"]], axes.of[a["weight"]]
    unify(x[-1], w[1], node.name)
    axes.sink(node, 0, -1)
    if a["bias"] is not None:
        unify(axes.of[a["bias"]][0], w[0], node.name)
    return [*x[:-1], w[0]]


def matmul(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[.., M, K] x [.., K, N] -> [.., M, N]."""
    return _matmul(axes, node, 0)


def add_matmul(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """addmm, baddbmm: a matmul with a first operand that is added."""
    out = _matmul(axes, node, 1)
    added = axes.operand(node, source(node))
    return broadcast([cast(Types, out), added], node.name)


def _matmul(axes: Axes, node: fx.Node, first: int) -> NodeTypes:
    left, right = axes.input(node, first), axes.input(node, first + 1)
    if len(left) < 2 or len(right) < 2:
        return axes.unknown(node, "matmul with a vector")
    batch = broadcast([left[:-2], right[:-2]], node.name) if len(left) > 2 or len(right) > 2 else []
    unify(left[-1], right[-2], node.name)
    axes.sink(node, first, -1)
    if len(left) > 2 and len(right) > 2:
        _mark_attention(batch, left[-1], right[-1])
    return [*batch, left[-2], right[-1]]


def _mark_attention(batch: Types, qk: Any, vo: Any) -> None:
    for axis in batch:
        axis.mark("head")
    qk.mark("qk")
    vo.mark("vo")


def attention(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """[B, Hq, Sq, D], [B, Hk, Sk, D], [B, Hk, Sk, E] -> [B, Hq, Sq, E]; Hq is Hk times the queries of a group."""
    keys = ("q", "k", "v") if "q" in a else ("query", "key", "value")
    q, k, v = (axes.of[a[name]] for name in keys)
    if k[-3].root.size != q[-3].root.size:
        for kv in (k, v):
            got = regroup(q[-3].factors, [kv[-3].root.size, divide(q[-3].root.size, kv[-3].root.size) or 0])
            if got is None:
                q[-3].freeze("query heads that do not divide into KV groups")
                kv[-3].freeze("query heads that do not divide into KV groups")
            else:
                unify(got[0], kv[-3], node.name)
        batch = q[:-2]
    else:
        batch = broadcast([q[:-2], k[:-2], v[:-2]], node.name)
    unify(q[-1], k[-1], node.name)
    unify(k[-2], v[-2], node.name).freeze("softmax runs over it")
    for name in ("attn_mask", "bias"):
        if a.get(name) is not None:
            broadcast([[*batch, q[-2], k[-2]], axes.operand(node, a[name])], node.name)
    if a.get("alibi_slopes") is not None:
        unify(batch[-1], axes.operand(node, a["alibi_slopes"])[0], node.name)
    axes.sink(node, 0, -1)
    _mark_attention(batch[1:], q[-1], v[-1])
    return [*batch, q[-2], v[-1]]


def embedding(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Rows of a table: the rows are frozen, the columns are the output's last dimension."""
    weight = axes.of[a["weight"]]
    weight[0].freeze("vocabulary")
    return [*axes.of[a["indices"]], weight[1]]


def convolution(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[B, I, ..] x [O, I, ..] -> [B, O, ..], without channel groups."""
    x, weight = axes.of[a["input"]], axes.of[a["weight"]]
    if a["groups"] != 1:
        return axes.unknown(node, "convolution with channel groups")
    unify(x[1], weight[1], node.name)
    axes.sink(node, 0, 1)
    if a["bias"] is not None:
        unify(axes.of[a["bias"]][0], weight[0], node.name)
    out = fresh(value_of(node))
    for axis in (*x[2:], *weight[2:], *out[2:]):
        axis.freeze("convolution window")
    return [x[0], weight[0], *out[2:]]


def grouped_matmul(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[T, I] x [E, I, O] -> [T, O], rows sorted by expert; the experts are frozen."""
    x, weight = axes.input(node), axes.input(node, 1)
    if len(x) != 2 or len(weight) != 3:
        return axes.unknown(node, "grouped matmul of another rank")
    weight[0].freeze("experts")
    unify(x[-1], weight[1], node.name)
    axes.sink(node, 0, -1)
    return [x[0], weight[2]]


RULES = {
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.bmm.default: matmul,
    aten.mm.default: matmul,
    aten.addmm.default: add_matmul,
    aten.baddbmm.default: add_matmul,
    aten.scaled_dot_product_attention.default: attention,
    torch.ops.tilecut.attention.default: attention,
    aten.embedding.default: embedding,
    aten.conv1d.default: convolution,
    aten.conv2d.default: convolution,
    aten.convolution.default: convolution,
    aten._grouped_mm.default: grouped_matmul,
}
