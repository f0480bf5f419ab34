"""Rules for ops that sum a dimension away between two operands: linear, matmul, attention; and for tables.

The contracted dimensions of both operands are one, and the activation's side is recorded as a sink: multiplying it by
0 or 1 there is what removing units means.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, divide, regroup, unify
from tilecut_passes.axes.infer import (
    Axes,
    NodeTypes,
    Types,
    broadcast,
    freeze_all,
    fresh_types,
    op_name,
    result_is_used,
)
from tilecut_passes.graph import PACKED_ATTENTION, source, value_of

# Importing them registers tilecut's ops.
from tilecut_runtime import attention as _attention_op
from tilecut_runtime import grouped_matmul as _grouped_matmul_op

aten = torch.ops.aten
assert _attention_op and _grouped_matmul_op


def linear(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """[.., I] x [O, I] + [O] -> [.., O]; a weight of one dimension has no O."""
    x, w = axes.of[a["input"]], axes.of[a["weight"]]
    unify(x[-1], w[-1], node.name)
    axes.sink(node, 0, -1)
    out = [*x[:-1], *w[:-1]]
    return out if a["bias"] is None else broadcast([out, axes.of[a["bias"]]], node.name)


def matmul(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """[.., M, K] x [.., K, N] -> [.., M, N]; a vector has no M or N (mv, dot)."""
    return _matmul(axes, node, 0)


def add_matmul(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """addmm, baddbmm, addmv: a matmul with a first operand that is added."""
    return broadcast([_matmul(axes, node, 1), axes.operand(node, source(node))], node.name)


def _matmul(axes: Axes, node: fx.Node, first: int) -> Types:
    left, right = axes.input(node, first), axes.input(node, first + 1)
    inner = right[-2] if len(right) > 1 else right[-1]
    unify(left[-1], inner, node.name)
    axes.sink(node, first, -1)
    batch = broadcast([left[:-2], right[:-2]], node.name)
    if not axes.weights.isdisjoint((source(node, first), source(node, first + 1))):
        # A matrix for each of the batch: experts, or a dense layer in another spelling.
        for axis in batch:
            axis.mark("expert")
    elif len(left) > 2 and len(right) > 2:
        _mark_attention(batch, left[-1], right[-1])
    return [*batch, *left[-2:-1], *(right[-1:] if len(right) > 1 else [])]


def add_batch_matmul(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """addbmm: [B, M, K] x [B, K, N] summed over B too, and added."""
    left, right = axes.of[a["batch1"]], axes.of[a["batch2"]]
    unify(left[0], right[0], node.name)
    unify(left[2], right[1], node.name)
    axes.sink(node, 1, 0)
    axes.sink(node, 1, 2)
    return broadcast([[left[1], right[2]], axes.operand(node, source(node))], node.name)


def inner_product(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[.., K] x [~, K] -> [.., ~]."""
    left, right = axes.input(node), axes.input(node, 1)
    if not left or not right:
        return axes.unknown(node, "inner product with a number")
    unify(left[-1], right[-1], node.name)
    axes.sink(node, 0, -1)
    return [*left[:-1], *right[:-1]]


def vector_dot(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """linalg_vecdot: an elementwise product summed over one dimension."""
    left, right = axes.input(node), axes.input(node, 1)
    if len(left) != len(right) or left[a["dim"]].root.size != right[a["dim"]].root.size:
        return axes.unknown(node, "vecdot that stretches")
    out, d = broadcast([left, right], node.name), a["dim"] % len(left)
    axes.sink(node, 0, d)
    return [*out[:d], *out[d + 1 :]]


def outer(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """outer, addr: [M] x [N] -> [M, N]."""
    added = [axes.operand(node, source(node))] if op_name(node) == "addr" else []
    first = len(added)
    vectors = [axes.operand(node, source(node, i))[0] for i in (first, first + 1)]
    return broadcast([vectors, *added], node.name)


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
            _group_queries(q[-3], kv[-3], node.name)
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


def _group_queries(q_heads: Axis, kv_heads: Axis, why: str) -> None:
    """Hq is Hk times the queries of a group."""
    got = regroup(q_heads.factors, [kv_heads.root.size, divide(q_heads.root.size, kv_heads.root.size) or 0])
    if got is None:
        q_heads.freeze("query heads that do not divide into KV groups")
        kv_heads.freeze("query heads that do not divide into KV groups")
    else:
        unify(got[0], kv_heads, why)


def packed_attention(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[Tq, Hq, D], [Tk, Hk, D], [Tk, Hk, E] -> [Tq, Hq, E] and [Hq, Tq]; sequences lie along the tokens."""
    q, k, v = (axes.of[a[name]] for name in "qkv")
    for kv in (k, v):
        _group_queries(q[1], kv[1], node.name)
    unify(q[2], k[2], node.name)
    unify(k[0], v[0], node.name)
    for tokens in (q[0], k[0]):
        tokens.freeze("sequences lie along it")
    for name in ("cu_seqlens_q", "cu_seqlens_k", "block_offsets", "block_indices"):
        if a[name] is not None:
            freeze_all(axes.of[a[name]], "it bounds sequences")
    if a["block_offsets"] is not None and value_of(a["block_offsets"]).shape[0] != 1:
        q[1].freeze("every head has a block list of its own")
    if a["alibi_slopes"] is not None:
        unify(q[1], axes.operand(node, a["alibi_slopes"])[0], node.name)
    axes.sink(node, 0, 2)
    _mark_attention(q[1:2], q[2], v[2])
    return [[q[0], q[1], v[2]], [q[1], q[0]]]


def embedding(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Rows of a table: the columns are the output's last dimension, and the rows are frozen.

    Unless ids of the caller say which: then the rows may be a vocabulary. Rows of what the ids point into are that.
    """
    weight = axes.of[a["weight"]]
    if a["indices"] in axes.ids:
        axes.lookups.append(node)
        axes.contend(weight[0].mark("vocab"), "vocabulary")
    else:
        axes.index_by(weight[0], a["indices"], "vocabulary")
    return [*axes.of[a["indices"]], weight[1]]


def embedding_bag(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """Rows of a table summed per bag; the results beside the first are bookkeeping."""
    if any(result_is_used(node, i) for i in range(1, 4)):
        return axes.unknown(node, "the bookkeeping of embedding_bag is read")
    weight = axes.of[a["weight"]]
    weight[0].freeze("vocabulary")
    for name in ("indices", "offsets", "per_sample_weights"):
        if a[name] is not None:
            freeze_all(axes.of[a[name]], "bags run over it")
    bags, *others = cast(list[Types], fresh_types(value_of(node)))
    bags[0].freeze("bags")
    return [[bags[0], weight[1]], *others]


def grouped_matmul(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """[T, I] x [E, I, O] -> [T, O], rows sorted by expert; experts compete where the ends of their rows are computed."""
    x, weight = axes.input(node), axes.input(node, 1)
    if len(x) != 2 or len(weight) != 3:
        return axes.unknown(node, "grouped matmul of another rank")
    axes.contend(weight[0].mark("expert"), "experts")
    if source(node, 2) in axes.constants:
        weight[0].freeze("experts")
    unify(weight[0], axes.operand(node, source(node, 2))[0], node.name)
    unify(x[-1], weight[1], node.name)
    axes.sink(node, 0, -1)
    return [x[0], weight[2]]


MATMULS = (
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.mv.default,
    aten.dot.default,
    aten.vdot.default,
)

RULES = {
    aten.linear.default: linear,
    **dict.fromkeys(MATMULS, matmul),
    aten.addmm.default: add_matmul,
    aten.baddbmm.default: add_matmul,
    aten.addmv.default: add_matmul,
    aten.addbmm.default: add_batch_matmul,
    aten.inner.default: inner_product,
    aten.linalg_vecdot.default: vector_dot,
    aten.outer.default: outer,
    aten.ger.default: outer,
    aten.addr.default: outer,
    aten.scaled_dot_product_attention.default: attention,
    torch.ops.tilecut.attention.default: attention,
    PACKED_ATTENTION: packed_attention,
    aten.embedding.default: embedding,
    aten.embedding_bag.default: embedding_bag,
    aten.embedding_bag.padding_idx: embedding_bag,
    aten._embedding_bag.default: embedding_bag,
    aten._grouped_mm.default: grouped_matmul,
    torch.ops.tilecut.grouped_matmul.default: grouped_matmul,
}
