"""Find the places of a fused graph that a form can be chosen for, each as a small graph of its own.

A site holds what its forms write differently, and nothing else: an attention with the linear layers that make its heads
and the reshapes around it; the linear layer and its gelu; a residual addition and its norm. Its inputs are the values
that come from outside, under their nodes' names. Rotary embeddings stay with their tables as far as these show that pairs
share a number, and with the attention that reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, is_call, source, swaps_heads, value_of
from tilecut_passes.layer_region import extract
from tilecut_targets.edge.lower_attention import (
    LowerAttention,
    find_attentions,
    find_projection,
)
from tilecut_targets.edge.lower_bias_gelu import LowerBiasGelu
from tilecut_targets.edge.lower_residual import NORMS, LowerResidual
from tilecut_targets.edge.lower_rms_norm import LowerRmsNorm
from tilecut_targets.edge.lower_rotary import LowerRotary, pair_chain
from tilecut_targets.edge.merge_products import MergeProducts, attention_of, find_gate

aten = torch.ops.aten


def find_sites(graph: Graph, kind: str) -> Iterator[Graph]:
    """The sites of a kind in graph order; the graph is left alone."""
    for inside in SITES[kind](graph):
        yield _site(graph, inside)


def _attentions(graph: Graph, packable: bool) -> Iterator[set[fx.Node]]:
    for node in find_attentions(graph, packable):
        if LowerAttention().match(node):
            continue
        inside = {node}
        for heads in node.args[:3]:
            assert isinstance(heads, fx.Node)
            if rotary := _rotary(heads):
                inside |= rotary
                heads = source(heads)
            if find_projection(graph, heads) is not None:
                inside |= {heads, source(heads), source(source(heads))}
            elif swaps_heads(heads):
                inside.add(heads)
        for user in node.users:
            if swaps_heads(user):
                inside |= {user, *(one for one in user.users if is_call(one, aten.reshape.default))}
        yield inside


def _residuals(graph: Graph) -> Iterator[set[fx.Node]]:
    for node in graph.nodes:
        if is_call(node, *NORMS) and LowerResidual().match(node.args[0]):
            yield {node, source(node)}


def _norms(graph: Graph) -> Iterator[set[fx.Node]]:
    yield from ({node} for node in graph.nodes if LowerRmsNorm().match(node))


def _rotaries(graph: Graph) -> Iterator[set[fx.Node]]:
    yield from (inside for node in graph.nodes if (inside := _rotary(node)))


def _rotary(node: fx.Node) -> set[fx.Node]:
    """A rotary embedding that has forms, with what shows it of its tables; else nothing."""
    if not is_call(node, torch.ops.tilecut.rotary.default) or LowerRotary().match(node):
        return set()
    chains = [pair_chain(source(node, i), bool(node.kwargs["interleaved"])) for i in (1, 2)]
    return {node, *(one for chain in chains for one in chain or ())}


def _qkv(graph: Graph) -> Iterator[set[fx.Node]]:
    """The layers, their attention, by which they are known, and what lies between."""
    for group in MergeProducts("qkv").match(graph):
        attention = attention_of(group[0])
        assert attention is not None
        behind, before = {*group}, {attention}
        for node in graph.nodes:
            if not behind.isdisjoint(node.all_input_nodes) and node < attention:
                behind.add(node)
        for node in reversed(list(graph.nodes)):
            if node in behind and not before.isdisjoint(node.users):
                before.add(node)
        yield before.union(*map(_rotary, before))


def _gates(graph: Graph) -> Iterator[set[fx.Node]]:
    for group in MergeProducts("gate").match(graph):
        users = {user for one in group for user in one.users}
        yield {*group, *users, *(user for one in users for user in one.users if find_gate(user) == group)}


def _gelus(graph: Graph) -> Iterator[set[fx.Node]]:
    yield from ({node, source(node)} for node in graph.nodes if LowerBiasGelu().match(node))


# Kind -> what is inside each of its sites, in graph order.
SITES: dict[str, Callable[[Graph], Iterator[set[fx.Node]]]] = {
    "residual": _residuals,
    "norm": _norms,
    "rotary": _rotaries,
    "qkv": _qkv,
    "attention": functools.partial(_attentions, packable=True),
    "other_attention": functools.partial(_attentions, packable=False),
    "gate": _gates,
    "gelu": _gelus,
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
