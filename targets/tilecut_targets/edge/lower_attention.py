"""Lower `tilecut::attention` to the fused ops of onnxruntime's CPU provider.

Before: tilecut::attention(q, k, v, key_padding, bias), heads apart: [B, H, S, D].
After, the first form that fits:
    packed      com.microsoft::Attention(x, Wqkv, bqkv, mask): q, k and v are linear layers of one x; the three weights
                are packed here, at compile time
    separate    com.microsoft::MultiHeadAttention(q, k, v, .., mask, bias): heads folded into the last dimension, key and
                value heads repeated for grouped queries, a window with its global tokens written into the bias
Left alone, with the reason in `graph.refusals` (the exporter then writes MatMul and Softmax): soft-caps, ALiBi in the
op, dropout, and causal attention whose queries and keys differ in number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tilecut_passes.graph import (
    Graph,
    Refusal,
    arguments,
    calls_before,
    is_call,
    sizes_of,
    source,
    swaps_heads,
    value_of,
)
from tilecut_targets.decompose_attention import finite
from tilecut_targets.edge import ort_ops
from tilecut_targets.window_bias import window_bias

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """A head tensor [B, H, S, D] that is a linear layer of `source`: weight [H*D, I], bias [H*D] or None."""

    source: fx.Node
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LowerAttention:
    """Every attention that onnxruntime has a fused op for becomes one; unless `packed`, all take the separate form.

    `packable` names those that are lowered: True those whose projection could be packed, False the others, None all.
    """

    packed: bool = True
    packable: bool | None = None

    def match(self, node: fx.Node) -> str | None:
        """Why neither fused op can express this attention, or None when one can."""
        a = arguments(node)
        q, k = value_of(a["q"]), value_of(a["k"])
        if a["dropout_p"]:
            return "dropout: the fused ops of the CPU provider have none"
        if a["softcap"] or a["alibi_slopes"] is not None:
            return "soft-cap or ALiBi: the fused ops of the CPU provider have none"
        if a["causal"] != "none" and sizes_of(q)[2] != sizes_of(k)[2]:
            return f"{a['causal']} causal attention between different numbers of queries and keys"
        if a["bias"] is not None and any(
            s == 1 and w != 1 for s, w in zip(value_of(a["bias"]).shape[2:], (q.shape[2], k.shape[2]))
        ):
            return "a bias that is broadcast over queries or keys"
        return None

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of attentions."""
        masks: dict[fx.Node, fx.Node] = {}
        biases: dict[fx.Node, fx.Node] = {}
        windows: dict[tuple[Any, ...], fx.Node] = {}
        count = 0
        for node in find_attentions(graph, self.packable):
            if reason := self.match(node):
                graph.refusals.append(Refusal("LowerAttention", node.name, reason))
                continue
            a = arguments(node)
            mask = _once(graph, node, a["key_padding"], masks, aten._to_copy.default, dtype=torch.int32)
            if self.packed and (parts := packable_projections(graph, node)):
                folded = _packed(graph, node, a, mask, parts)
            else:
                bias = _with_window(graph, node, _once(graph, node, a["bias"], biases, finite), windows)
                folded = _separate(graph, node, a, mask, bias)
            put_folded(graph, node, folded)
            count += 1
        return count


def find_attentions(graph: Graph, packable: bool | None) -> list[fx.Node]:
    """The attentions whose projection can be packed (True), the others (False), or all (None)."""
    found = [n for n in graph.nodes if is_call(n, torch.ops.tilecut.attention.default)]
    return [n for n in found if packable is None or packable == bool(packable_projections(graph, n))]


def packable_projections(graph: Graph, node: fx.Node) -> list[Projection]:
    """The layers of an attention's q, k and v if one product can stand for them: equal ones of one input; or nothing."""
    a = arguments(node)
    if a["bias"] is not None or max(a["window"]) >= 0:
        return []
    parts = [p for name in "qkv" if (p := find_projection(graph, a[name])) is not None]
    return parts if len(parts) == 3 and len({(p.source, p.weight.shape) for p in parts}) == 1 else []


def find_projection(graph: Graph, heads: fx.Node) -> Projection | None:
    """The linear layer behind transpose(reshape(linear(x), [B, S, H, D]), 1, 2), or None."""
    if not swaps_heads(heads):
        return None
    split = source(heads)
    if not is_call(split, aten.reshape.default) or value_of(split).ndim != 4:
        return None
    linear = split.args[0]
    if (
        not is_call(linear, aten.linear.default)
        or value_of(linear).ndim != 3
        or sizes_of(value_of(linear))[:2] != sizes_of(value_of(split))[:2]
    ):
        return None
    a = arguments(linear)
    tensors = [a["weight"], *([a["bias"]] if a["bias"] is not None else [])]
    if any(x.op != "get_attr" for x in tensors):
        return None
    weight, *bias = (graph.tensor(str(x.target)).detach() for x in tensors)
    return Projection(a["input"], weight, bias[0] if bias else None)


def joined(layers: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Weights [O, I] and biases [O] of layers as those of one layer; a layer without bias gets zeros."""
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in layers]
    return torch.cat([weight for weight, _ in layers]), torch.cat(biases)


def _packed(graph: Graph, node: fx.Node, a: dict[str, Any], mask: fx.Node | None, parts: list[Projection]) -> fx.Node:
    weight, bias = joined([(p.weight, p.bias) for p in parts])
    w, b = (
        graph.add_tensor(f"{node.name}_qkv.weight", nn.Parameter(weight.T.contiguous())),
        graph.add_tensor(f"{node.name}_qkv.bias", nn.Parameter(bias)),
    )
    with calls_before(graph, node) as call:
        return call(
            ort_ops.attention, parts[0].source, w, b, mask, value_of(a["q"]).shape[1], a["scale"], a["causal"] != "none"
        )


def _separate(graph: Graph, node: fx.Node, a: dict[str, Any], mask: fx.Node | None, bias: fx.Node | None) -> fx.Node:
    with calls_before(graph, node) as call:
        folded = []
        for name in "qkv":
            heads = a[name]
            apart = source(heads) if swaps_heads(heads) else call(aten.transpose.int, heads, 1, 2)
            if (repeats := value_of(a["q"]).shape[1] // value_of(heads).shape[1]) > 1:
                wide = call(aten.unsqueeze.default, apart, 3)
                wide = call(aten.expand.default, wide, [-1, -1, -1, repeats, -1])
                apart = call(aten.flatten.using_ints, wide, 2, 3)
            folded.append(call(aten.flatten.using_ints, apart, 2, 3))
        return call(
            ort_ops.multi_head_attention,
            *folded,
            mask,
            bias,
            value_of(a["q"]).shape[1],
            a["scale"],
            a["causal"] != "none",
        )


def _with_window(
    graph: Graph, node: fx.Node, bias: fx.Node | None, made: dict[tuple[Any, ...], fx.Node]
) -> fx.Node | None:
    """The bias with the window, which is made once for all attentions that have the same."""
    a = arguments(node)
    if max(a["window"]) < 0:
        return bias
    sizes = [str(s) for name in "qk" for s in (sizes_of(value_of(a[name]))[2], value_of(a[name]).dtype)]
    key = (*a["window"], a["global_tokens"], a["causal"], *sizes)
    with calls_before(graph, node) as call:
        if key not in made:
            made[key] = call(window_bias, a["q"], a["k"], a["causal"], list(a["window"]), a["global_tokens"])
        return made[key] if bias is None else call(aten.add.Tensor, bias, made[key])


def _once(
    graph: Graph,
    before: fx.Node,
    operand: fx.Node | None,
    made: dict[fx.Node, fx.Node],
    op: Any,
    *args: Any,
    **kwargs: Any,
) -> fx.Node | None:
    """`op(operand, ..)`, made once for all attentions that share the operand: before the first of them."""
    if operand is None:
        return None
    if operand not in made:
        with calls_before(graph, before) as call:
            made[operand] = call(op, operand, *args, **kwargs)
    return made[operand]


def put_folded(graph: Graph, node: fx.Node, folded: fx.Node) -> None:
    """Give the users of [B, H, S, E] the folded [B, S, H*E]; the usual transpose and reshape back disappear."""
    heads, width = value_of(node).shape[1], value_of(node).shape[3]
    for user in list(node.users):
        if swaps_heads(user):
            for fold in list(user.users):
                if is_call(fold, aten.reshape.default) and sizes_of(value_of(fold)) == sizes_of(value_of(folded)):
                    fold.replace_all_uses_with(folded)
                    graph.fx.erase_node(fold)
            if not user.users:
                graph.fx.erase_node(user)
    if node.users:
        with calls_before(graph, node) as call:
            apart = call(aten.transpose.int, call(aten.unflatten.int, folded, 2, [heads, width]), 1, 2)
        node.replace_all_uses_with(apart)
    graph.fx.erase_node(node)
