"""Find the places of a fused graph that a form can be chosen for, each as a small graph of its own.

A site holds what its forms write differently, and nothing else: an attention with the linear layers that make its heads
and the reshapes around it; the linear layer and its gelu; a residual addition and its norm. Its inputs are the values
that come from outside, under their nodes' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, is_call, source, value_of
from tilecut_passes.layer_region import extract
from tilecut_targets.edge.lower_attention import LowerAttention, find_projection, swaps_heads
from tilecut_targets.edge.lower_bias_gelu import LowerBiasGelu
from tilecut_targets.edge.lower_residual import LowerResidual

aten = torch.ops.aten


def find_sites(graph: Graph, kind: str) -> Iterator[Graph]:
    """The sites of a kind in graph order; the graph is left alone."""
    for node in graph.nodes:
        inside = SITES[kind](graph, node)
        if inside:
            yield _site(graph, inside)


def _attention(graph: Graph, node: fx.Node) -> set[fx.Node]:
    if not is_call(node, torch.ops.tilecut.attention.default) or LowerAttention().match(node):
        return set()
    inside = {node}
    for heads in node.args[:3]:
        assert isinstance(heads, fx.Node)
        if find_projection(graph, heads) is not None:
            inside |= {heads, source(heads), source(source(heads))}
        elif swaps_heads(heads):
            inside.add(heads)
    for user in node.users:
        if swaps_heads(user):
            inside |= {user, *(one for one in user.users if is_call(one, aten.reshape.default))}
    return inside


def _residual(graph: Graph, node: fx.Node) -> set[fx.Node]:
    return {node, source(node)} if is_call(node, aten.layer_norm.default) and LowerResidual().match(node.args[0]) else set()


def _gelu(graph: Graph, node: fx.Node) -> set[fx.Node]:
    return {node, source(node)} if LowerBiasGelu().match(node) else set()


SITES: dict[str, Callable[[Graph, fx.Node], set[fx.Node]]] = {
    "attention": _attention,
    "residual": _residual,
    "gelu": _gelu,
}


def _site(graph: Graph, inside: set[fx.Node]) -> Graph:
    """The nodes, the weights and sizes that they read, and everything else that they read as inputs."""
    inputs: set[fx.Node] = set()
    copied: set[fx.Node] = set()
    todo = list(inside)
    while todo:
        node = todo.pop()
        if node in inputs or node in copied:
            continue
        value = node.op == "placeholder" or (node.op != "get_attr" and isinstance(value_of(node), Tensor))
        (inputs if value and node not in inside else copied).add(node)
        if node in copied:
            todo += node.all_input_nodes
    return extract(graph, inside, inputs, copied)
