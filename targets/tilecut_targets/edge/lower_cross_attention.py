"""Lower attention on keys and values that an encoder gave to com.microsoft::MultiHeadAttention, which reads them as they are.

Before: tilecut::attention(q [B, Hq, S, D], k, v [B, Hk, T, D], key_padding), k and v inputs of the graph, seen whole.
After: MultiHeadAttention on q with its heads folded into the last dimension and k, v with theirs set apart: nothing is
copied in a step. The queries of a KV group become tokens of one head, since every query sees the same keys.
Left alone: soft-caps, biases, keys and values of two widths (`pad_heads.py` makes them one); other lowerings take them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.graph import Graph, arguments, calls_before, is_call, source, swaps_heads, value_of
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.lower_attention import put_folded

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerCrossAttention:
    """Every attention on inputs of the graph that the op can express becomes one."""

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of attentions."""
        found = [n for n in graph.nodes if is_call(n, torch.ops.tilecut.attention.default) and _fits(n)]
        masks: dict[fx.Node, fx.Node] = {}
        for node in found:
            a = arguments(node)
            if (mask := a["key_padding"]) is not None and mask not in masks:
                with calls_before(graph, node) as call:
                    masks[mask] = call(aten._to_copy.default, mask, dtype=torch.int32)
            put_folded(graph, node, _lower(graph, node, None if mask is None else masks[mask]))
        return len(found)


def _fits(node: fx.Node) -> bool:
    a = arguments(node)
    if any(a[name].op != "placeholder" for name in "kv") or value_of(a["k"]).shape[3] != value_of(a["v"]).shape[3]:
        return False
    plain = a["bias"] is None and a["alibi_slopes"] is None and not a["softcap"] and not a["dropout_p"]
    return plain and a["causal"] == "none" and max(a["window"]) < 0


def _lower(graph: Graph, node: fx.Node, mask: fx.Node | None) -> fx.Node:
    """The output [B, S, Hq*D]."""
    a = arguments(node)
    heads, groups = (int(value_of(a[name]).shape[1]) for name in "qk")
    each = heads // groups
    with calls_before(graph, node) as call:
        q = source(a["q"]) if swaps_heads(a["q"]) else call(aten.transpose.int, a["q"], 1, 2)
        if each > 1:
            # [B, S, Hk, each, D] -> [B, S * each, Hk, D]
            q = call(aten.transpose.int, call(aten.unflatten.int, q, 2, [groups, each]), 2, 3)
            q = call(aten.flatten.using_ints, q, 1, 2)
        folded = call(aten.flatten.using_ints, q, 2, 3)
        out = call(ort_ops.multi_head_attention, folded, a["k"], a["v"], mask, None, groups, a["scale"], False)
        if each > 1:
            out = call(aten.unflatten.int, call(aten.unflatten.int, out, 2, [groups, -1]), 1, [-1, each])
            out = call(aten.flatten.using_ints, call(aten.transpose.int, out, 2, 3), 2, 4)
        return out
