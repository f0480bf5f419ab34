"""Compute one output for the last real token of every row alone.

Before: out [B, S, V], made of what the attentions give by ops that treat tokens one by one. After: [B, 1, V]: what such ops
read is gathered at the token lengths[b] - 1 first, so that they run on one token a row: the layer of the vocabulary, the
last norm, the last layer's feed-forward network. Left as they are: nodes that something else reads too, and everything
before a reshape.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tilecut_passes.axes.infer import elementwise
from tilecut_passes.axes.rules import RULES
from tilecut_passes.graph import Graph, calls_before, is_call, sizes_of, value_of
from tilecut_runtime.errors import LoweringError

aten = torch.ops.aten
# Ops on the last dimension, beside those on elements alone.
ALONE = (aten.linear.default, aten.rms_norm.default, aten.layer_norm.default)


def keep_last_token(graph: Graph, result: fx.Node, tokens: fx.Node, lengths: fx.Node) -> fx.Node:
    """The node that stands for `result` [B, S, V] as [B, 1, V].

    Args:
        tokens: an input [B, S].
        lengths: int64 [B], how many tokens of each row are real.

    Raises:
        LoweringError: the output is not [B, S, V].
    """
    sizes = sizes_of(value_of(tokens))
    if (
        sizes_of(value_of(result))[:2] != sizes
        or value_of(result).ndim != 3
        or not isinstance(value_of(result).shape[2], int)
    ):
        raise LoweringError(
            "AddCache",
            f"the output {result.name} is no logits",
            got=sizes_of(value_of(result)),
            wanted=f"[{sizes[0]}, {sizes[1]}, V]",
        )
    inside = _inside(graph, result, sizes)
    gathered: dict[fx.Node, fx.Node] = {}
    with calls_before(graph, graph.first_call()) as call:
        batch, length = (call(aten.sym_size.int, tokens, d) for d in (0, 1))
        last = call(aten.clamp.default, call(aten.sub.Tensor, lengths, 1), 0)
        rows = call(aten.mul.Tensor, call(aten.arange.default, batch), length)
        place = call(aten.unsqueeze.default, call(aten.add.Tensor, rows, last), 1)

    def at_last(node: fx.Node) -> fx.Node:
        if node not in gathered:
            with calls_before(graph, node.next) as call:
                flat = call(aten.flatten.using_ints, node, 0, 1)
                gathered[node] = call(aten.embedding.default, flat, place)
        return gathered[node]

    for node in inside:
        for one in node.all_input_nodes:
            if one not in inside and isinstance(value_of(one), Tensor) and sizes_of(value_of(one))[:2] == sizes:
                node.replace_input_with(one, at_last(one))
    return result if result in inside else at_last(result)


def _inside(graph: Graph, result: fx.Node, sizes: list) -> list[fx.Node]:
    """The nodes that lead to the result alone and treat tokens one by one, in graph order."""
    found: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        leads = node is result or (node.users and all(user in found for user in node.users))
        if leads and _treats_alone(node, sizes):
            found.add(node)
    return [n for n in graph.nodes if n in found]


def _treats_alone(node: fx.Node, sizes: list) -> bool:
    op = node.target
    if (
        node.op != "call_function"
        or not isinstance(op, torch._ops.OpOverload)
        or not isinstance(value_of(node), Tensor)
    ):
        return False
    pointwise = torch.Tag.pointwise in op.tags or RULES.get(op) is elementwise
    if not pointwise and not is_call(node, *ALONE):
        return False
    if any(not isinstance(value_of(one), Tensor) for one in node.all_input_nodes):
        return False
    shapes = [sizes_of(value_of(one)) for one in (node, *node.all_input_nodes)]
    return shapes[0][:2] == sizes and all(
        (len(shape) == 3 and shape[:2] == sizes) or all(isinstance(s, int) for s in shape) for shape in shapes
    )
