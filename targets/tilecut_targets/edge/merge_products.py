"""Make one product of linear layers that read the same input.

Before: linear(x, W1, b1), linear(x, W2, b2), .. of one x. After: the parts of linear(x, [W1; W2; ..], [b1; b2; ..]), which
a Split cuts apart. Which layers:
    qkv     those that one attention reads, each through a reshape to [B, S, H, D]; not the layers of an attention whose
            projection LowerAttention packs
    gate    two whose outputs meet in a product, one of them behind an activation: SwiGLU and its like
Layers without bias beside others get zeros. Left alone: a layer whose weight something else reads too, since merged it would
be stored twice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tilecut_passes.graph import Graph, arguments, calls_before, is_call, sizes_of, source, value_of
from tilecut_targets.edge.lower_attention import LowerAttention, joined, packable_projections

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeProducts:
    """Every group of layers that read one input becomes one layer; `of` says which, "qkv" or "gate"."""

    of: str

    def match(self, graph: Graph) -> list[list[fx.Node]]:
        """The groups of layers, two or more each, in graph order; no layer is in two."""
        return _gates(graph) if self.of == "gate" else _projections(graph)

    def __call__(self, graph: Graph) -> int:
        """Rewrite in place; returns the number of groups."""
        groups = self.match(graph)
        for group in groups:
            merge(graph, group)
        return len(groups)


def _gates(graph: Graph) -> list[list[fx.Node]]:
    groups: list[list[fx.Node]] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        pair = find_gate(node)
        # An activation may gate several layers: the first pair has it.
        if pair and source(pair[0]) is source(pair[1]) and taken.isdisjoint(pair) and all(map(_owns_weights, pair)):
            groups.append(pair)
            taken.update(pair)
    return groups


def find_gate(node: fx.Node) -> list[fx.Node] | None:
    """The two layers whose outputs meet in `node`, one of them behind an activation, in graph order; or None."""
    if not is_call(node, aten.mul.Tensor) or len(node.all_input_nodes) != 2:
        return None
    for gate, up in ((0, 1), (1, 0)):
        activation, linear = source(node, gate), source(node, up)
        if activation.op != "call_function" or len(activation.all_input_nodes) != 1:
            continue
        gated = activation.all_input_nodes[0]
        layers = (gated, linear)
        if gated is linear or not all(is_call(one, aten.linear.default) and len(one.users) == 1 for one in layers):
            continue
        if sizes_of(value_of(activation)) == sizes_of(value_of(gated)):
            return sorted(layers)
    return None


def _projections(graph: Graph) -> list[list[fx.Node]]:
    groups: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = {}
    for node in graph.nodes:
        if not is_call(node, aten.linear.default) or not _owns_weights(node) or not _sets_heads_apart(node):
            continue
        attention = attention_of(node)
        if attention is not None and not (packable_projections(graph, attention) and not LowerAttention().match(attention)):
            groups.setdefault((source(node), attention), []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def attention_of(layer: fx.Node) -> fx.Node | None:
    """The first attention, in graph order, that a layer's heads reach, or None."""
    seen: set[fx.Node] = set()
    todo, found = [layer], []
    while todo:
        node = todo.pop()
        if node in seen or (node is not layer and is_call(node, aten.linear.default)):
            continue
        seen.add(node)
        if is_call(node, torch.ops.tilecut.attention.default):
            found.append(node)
        else:
            todo += node.users
    return min(found, default=None)


def _owns_weights(linear: fx.Node) -> bool:
    """Whether a layer's tensors are the graph's own, and read by it alone."""
    a = arguments(linear)
    tensors = [one for one in (a["weight"], a["bias"]) if one is not None]
    return all(one.op == "get_attr" and len(one.users) == 1 for one in tensors)


def _sets_heads_apart(linear: fx.Node) -> bool:
    users = list(linear.users)
    return (
        len(users) == 1
        and is_call(users[0], aten.reshape.default)
        and (value_of(linear).ndim, value_of(users[0]).ndim) == (3, 4)
        and sizes_of(value_of(users[0]))[:2] == sizes_of(value_of(linear))[:2]
    )


def merge(graph: Graph, layers: list[fx.Node]) -> None:
    """Put one layer in the place of `layers`, which read one input."""
    held: list[tuple[Tensor, Tensor | None]] = []
    for linear in layers:
        a = arguments(linear)
        weight, bias = (None if x is None else graph.tensor(str(x.target)).detach() for x in (a["weight"], a["bias"]))
        assert weight is not None
        held.append((weight, bias))
    name, (weight, bias) = f"{layers[0].name}_merged", joined(held)
    w = graph.add_tensor(f"{name}.weight", nn.Parameter(weight))
    biased = any(one is not None for _, one in held)
    b = graph.add_tensor(f"{name}.bias", nn.Parameter(bias)) if biased else None
    with calls_before(graph, layers[0]) as call:
        made = call(aten.linear.default, source(layers[0]), w, b)
        parts = _split(call, made, [len(one) for one, _ in held])
    for linear, part in zip(layers, parts):
        linear.replace_all_uses_with(part)
        graph.fx.erase_node(linear)


def _split(call: Callable[..., fx.Node], node: fx.Node, widths: list[int]) -> list[Any]:
    pieces = call(aten.split_with_sizes.default, node, widths, -1)
    return [call(operator.getitem, pieces, i) for i in range(len(widths))]
