"""Residual branches: what is computed only to be added to the stream that it was computed from.

A branch `y` of `x + y` depends on `x`, has the stream's shape and dtype, is read by that sum alone, and multiplies by
weights. Where `y` is itself a sum of such branches, as in blocks whose attention and FFN run side by side, each summand is
a branch. A branch is a leaf of one unit that multiplies every contraction in it: 1 where it stays, 0 where it is
removed, so that the block is the identity. Its gate is the operand of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.axes.axis import Axis
from tilecut_passes.graph import Graph, is_call, sizes_of, source, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Branch:
    """A branch: argument `argument` of the sum `node`. `nodes` run for it alone, its tensors' get_attr nodes included."""

    axis: Axis
    node: fx.Node
    argument: int
    nodes: frozenset[fx.Node]


def find_branches(graph: Graph, contractions: set[fx.Node]) -> list[Branch]:
    """Every residual branch of a graph in which one of `contractions` runs, in graph order."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found = []
    for node in order:
        if not is_sum(node):
            continue
        # What is computed later may be a branch of the other.
        argument = int(order[source(node, 1)] > order[source(node)])
        stream = source(node, 1 - argument)
        for sum_node, where in _summands(node, argument, order):
            branch = source(sum_node, where)
            if set(branch.users) != {sum_node} or not any(_depends(branch, x, order) for x in _stream(stream)):
                continue
            nodes = _alone(graph, branch, sum_node)
            if not nodes.isdisjoint(contractions):
                found.append(Branch(Axis.unit(), sum_node, where, frozenset(nodes)))
    return found


def remove_branches(graph: Graph, removed: list[Branch]) -> None:
    """Put the stream in the place of every sum; what ran for the branches is left for the clean-up."""
    gone = {(branch.node, branch.argument) for branch in removed}
    for node in list(graph.nodes):
        lost = [i for i in (0, 1) if (node, i) in gone]
        if len(lost) == 1:
            node.replace_all_uses_with(source(node, 1 - lost[0]))
        elif lost:
            # Both summands of a branch: the branch is.
            gone |= {(user, user.args.index(node)) for user in node.users}


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of one shape and dtype."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.all_input_nodes) != 2 or len(node.args) != 2:
        return False
    values: list[Any] = [value_of(x) for x in (node, *node.all_input_nodes)]
    first = values[0]
    return isinstance(first, Tensor) and all(
        isinstance(v, Tensor) and v.dtype == first.dtype and sizes_of(v) == sizes_of(first) for v in values
    )


def _summands(node: fx.Node, argument: int, order: Mapping[fx.Node, int]) -> Iterator[tuple[fx.Node, int]]:
    """The operand of a sum, or where it is a sum of two that do not depend on one another, both of its own."""
    operand = source(node, argument)
    if is_sum(operand) and set(operand.users) == {node}:
        a, b = operand.all_input_nodes
        early, late = (a, b) if order[a] < order[b] else (b, a)
        if not _depends(late, early, order):
            yield from _summands(operand, 0, order)
            yield from _summands(operand, 1, order)
            return
    yield node, argument


def _stream(node: fx.Node) -> Iterator[fx.Node]:
    """The stream, and what it is the sum of: a branch may have been computed before another was added."""
    yield node
    while is_sum(node):
        first, second = node.all_input_nodes
        yield first
        yield second
        node = first


def _depends(node: fx.Node, on: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether a node is computed from another."""
    todo, seen = [node], set()
    while todo:
        one = todo.pop()
        if one is on:
            return node is not on
        if one not in seen and order[one] > order[on]:
            seen.add(one)
            todo += one.all_input_nodes
    return False


def _alone(graph: Graph, branch: fx.Node, sum_node: fx.Node) -> set[fx.Node]:
    """The branch and everything that nothing else reads."""
    nodes = {branch}
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and node.users and node is not sum_node and nodes.issuperset(node.users):
            nodes.add(node)
    return nodes
