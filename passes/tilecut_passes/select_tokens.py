"""Choose the tokens that stay behind a layer: those that its attention looks at most.

The importance of token j is the sum, over heads and real queries, of the attention probabilities towards j (the
significance of PoWER-BERT, arXiv 2001.08950). The attention is written out for that, since a fused one keeps its
probabilities to itself. Padding goes first, whatever is looked at; the first tokens stay. Equal tokens go from the end.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from tilecut_passes.graph import Graph, arguments, calls_before, value_of

aten = torch.ops.aten
Call = Callable[..., fx.Node]
Count = int | fx.Node

# What a hidden pair's score is set to, and what ranks padding and removed tokens behind every real one.
HIDDEN, PADDING, REMOVED = -3e4, -1.0, -2.0


def write_out(graph: Graph, attention: fx.Node) -> fx.Node:
    """Replace a fused attention by matmuls and a softmax; returns every token's importance [B, S]."""
    a = arguments(attention)
    with calls_before(graph, attention) as call:
        scores = call(aten.matmul.default, call(aten.mul.Tensor, a["q"], a["scale"]), call(aten.transpose.int, a["k"], -1, -2))
        seen = None if a["key_padding"] is None else _for_keys(call, a["key_padding"])
        if seen is not None:
            scores = call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, seen), HIDDEN)
        weights = call(aten.softmax.int, scores, -1)
        result = call(aten.matmul.default, weights, a["v"])
        if seen is None:
            importance = call(aten.sum.dim_IntList, weights, [1, 2])
        else:
            real = call(aten._to_copy.default, seen, dtype=value_of(weights).dtype)
            importance = call(aten.sum.dim_IntList, call(aten.matmul.default, real, weights), [1, 2])
    attention.replace_all_uses_with(result)
    graph.fx.erase_node(attention)
    return importance


def select_tokens(
    call: Call,
    importance: fx.Node,
    seen: fx.Node | None,
    alive: fx.Node | None,
    tokens: Count,
    kept: Count,
    first: int,
) -> fx.Node:
    """The places [B, kept] of the tokens that stay, in their order.

    Args:
        importance: [B, S].
        seen: bool [B, S], False where a token is padding; None where none is.
        alive: bool [B, S], False where a token has gone before; None where none has.
        tokens: S.
    """
    ranks = importance
    for shown, rank in ((seen, PADDING), (alive, REMOVED)):
        if shown is not None:
            ranks = call(aten.masked_fill.Scalar, ranks, call(aten.logical_not.default, shown), rank)
    if first:
        places = call(aten.arange.default, tokens, device=value_of(importance).device)
        ranks = call(aten.masked_fill.Scalar, ranks, call(aten.lt.Scalar, places, first), math.inf)
    order = call(aten.sort.stable, ranks, stable=True, dim=1, descending=True)
    order = call(operator.getitem, order, 1)
    best = call(aten.index_select.default, order, 1, call(aten.arange.default, kept, device=value_of(importance).device))
    return call(operator.getitem, call(aten.sort.stable, best, stable=True, dim=1), 0)


def count_kept(call: Call, tokens: Count, fraction: Fraction) -> Count:
    """ceil(fraction * tokens), as a number or as arithmetic on a size."""
    if isinstance(tokens, int):
        return -(-tokens * fraction.numerator // fraction.denominator)
    times: Any = tokens if fraction.numerator == 1 else call(operator.mul, tokens, fraction.numerator)
    return call(operator.floordiv, call(operator.add, times, fraction.denominator - 1), fraction.denominator)


def _for_keys(call: Call, seen: fx.Node) -> fx.Node:
    """[B, S] as [B, 1, 1, S]."""
    return call(aten.unsqueeze.default, call(aten.unsqueeze.default, seen, 1), 1)


def mean_of_real(call: Call, states: fx.Node, dim: int, real: fx.Node | None) -> tuple[fx.Node, list[fx.Node]]:
    """The mean over tokens of a stream [B, S, H] (or [S, B, H]), where `real` [B, S] says so; and what reads `states`."""
    if real is None:
        mean = call(aten.mean.dim, states, [dim], True)
        return mean, [mean]
    weights = real if dim == 1 else call(aten.transpose.int, real, 0, 1)
    weights = call(aten._to_copy.default, call(aten.unsqueeze.default, weights, 2), dtype=value_of(states).dtype)
    weighted = call(aten.mul.Tensor, states, weights)
    count = call(aten.clamp_min.default, call(aten.sum.dim_IntList, weights, [dim], True), 1)
    return call(aten.div.Tensor, call(aten.sum.dim_IntList, weighted, [dim], True), count), [weighted]
