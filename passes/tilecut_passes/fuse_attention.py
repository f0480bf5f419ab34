"""Replace attention in ATen's spelling by one `tilecut::attention`.

Before: scaled_dot_product_attention(q, k, v, mask), q [B, Hq, S, D], with or without grouped queries.
After: tilecut::attention(q, k, v, key_padding, bias, None, scale=, causal=, ..): a mask that is recognised becomes
causal and key_padding and its sub-graph dies; any other mask is kept as an additive bias.
Left alone, with the reason in `graph.refusals`: attention of another rank, with dropout, or written out as matmul,
softmax, matmul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tilecut_passes.graph import Graph, Refusal, arguments, calls_before, is_call, value_of
from tilecut_passes.recognize_mask import MaskMeaning, recognize_mask

# Importing it registers tilecut::attention.
from tilecut_runtime import attention as _attention_op

aten = torch.ops.aten
assert _attention_op


@dataclass(frozen=True)
class Attention:
    """What `match` found: the operands and options of one attention."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float


@dataclass(frozen=True)
class FuseAttention:
    """Every attention becomes one op."""

    def match(self, node: fx.Node) -> Attention | str | None:
        """The attention at a node, the reason why it cannot be fused, or None when it is none."""
        if is_call(node, aten.softmax.int) and _weighs_values(node):
            return "attention is written out as matmul, softmax, matmul; build the model with sdpa attention"
        if not is_call(node, aten.scaled_dot_product_attention.default):
            return None
        a = arguments(node)
        if value_of(a["query"]).ndim != 4:
            return f"q has rank {value_of(a['query']).ndim}, wanted 4"
        if a["dropout_p"]:
            return f"it has dropout {a['dropout_p']}"
        scale = a["scale"] if a["scale"] is not None else int(value_of(a["query"]).shape[-1]) ** -0.5
        return Attention(a["query"], a["key"], a["value"], a["attn_mask"], a["is_causal"], scale)

    def __call__(self, graph: Graph) -> int:
        """Fuse in place; returns the number of attentions."""
        meanings: dict[fx.Node, MaskMeaning | str] = {}
        paddings: dict[tuple[str, tuple[str, int]], fx.Node] = {}
        count = 0
        for node in list(graph.nodes):
            found = self.match(node)
            if isinstance(found, str):
                graph.refusals.append(Refusal("FuseAttention", node.name, found))
            if isinstance(found, Attention):
                node.replace_all_uses_with(_fused(graph, node, found, meanings, paddings))
                graph.fx.erase_node(node)
                count += 1
        return count


def _weighs_values(softmax: fx.Node) -> bool:
    """Whether what a softmax gives is the left side of a matmul, perhaps after a cast or a view."""
    for user in softmax.users:
        if is_call(user, aten.matmul.default, aten.bmm.default):
            return user.args[0] is softmax
        if is_call(
            user, aten.to.dtype, aten._to_copy.default, aten.view.default, aten.reshape.default, aten.expand.default
        ):
            return _weighs_values(user)
    return False


def _fused(
    graph: Graph,
    node: fx.Node,
    found: Attention,
    meanings: dict[fx.Node, MaskMeaning | str],
    paddings: dict[tuple[str, tuple[str, int]], fx.Node],
) -> fx.Node:
    key_padding: Any = None
    bias: Any = None
    causal = "top_left" if found.is_causal else "none"
    if found.mask is not None:
        if found.mask not in meanings:
            meanings[found.mask] = recognize_mask(graph, found.mask, found.q, found.k)
        meaning = meanings[found.mask]
        if isinstance(meaning, str):
            graph.refusals.append(Refusal("FuseAttention", found.mask.name, f"mask kept as a tensor: {meaning}"))
            bias = _as_bias(graph, node, found)
        else:
            causal = meaning.causal
            if meaning.padding is not None:
                key_padding = _key_padding(graph, meaning, paddings)
    with calls_before(graph, node) as call:
        return call(
            torch.ops.tilecut.attention.default,
            found.q,
            found.k,
            found.v,
            key_padding,
            bias,
            None,
            scale=found.scale,
            causal=causal,
            window=[-1, -1],
            global_tokens=0,
            softcap=0.0,
            dropout_p=0.0,
        )


def _as_bias(graph: Graph, node: fx.Node, found: Attention) -> fx.Node:
    """An additive float mask; a boolean one becomes 0 and -inf."""
    assert found.mask is not None
    value = value_of(found.mask)
    with calls_before(graph, node) as call:
        mask = found.mask
        for _ in range(4 - value.ndim):
            mask = call(aten.unsqueeze.default, mask, 0)
        if value.dtype == torch.bool:
            dropped = call(aten.logical_not.default, mask)
            zeros = call(aten.zeros_like.default, mask, dtype=value_of(found.q).dtype)
            return call(aten.masked_fill.Scalar, zeros, dropped, float("-inf"))
        return mask


def _key_padding(graph: Graph, meaning: MaskMeaning, made: dict[tuple[str, tuple[str, int]], fx.Node]) -> fx.Node:
    """One bool [B, Sk] node for each input and predicate, at the top of the graph."""
    assert meaning.padding is not None
    key = (meaning.padding, meaning.keep)
    if key not in made:
        source = graph.input_node(meaning.padding)
        with calls_before(graph, graph.first_call()) as call:
            test, literal = meaning.keep
            made[key] = call(getattr(aten, test).Scalar, source, literal)
    return made[key]
