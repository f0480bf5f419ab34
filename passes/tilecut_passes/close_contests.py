"""Keep units from winning: what removing an expert means in the dense graph.

Before: a call along which units compete (softmax, top-k, argmax, a running sum). After: it reads minus infinity (a running
sum: 0) where a unit is removed, so that the others win what they would win without it. Left alone: other calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tilecut_passes.axes.infer import Axes, Contest
from tilecut_passes.axes.selection import Selection
from tilecut_passes.graph import Graph, source, value_of

aten = torch.ops.aten


def close_contests(axes: Axes, selection: Selection) -> int:
    """Close every contest of a graph to the units that a selection removes; returns how many."""
    count = 0
    for i, contest in enumerate(axes.contests):
        if selection.touches(contest.axis) and not selection.kept_mask(contest.axis).all():
            removed = ~selection.kept_mask(contest.axis)
            close_contest(axes.graph, contest, contest.node, f"tilecut_closed_{i}", removed)
            count += 1
    return count


def close_contest(graph: Graph, contest: Contest, node: fx.Node, name: str, removed: Tensor) -> fx.Node:
    """Let `node` read the fill of a contest where `removed` [U], put at `name`, says True; returns what it reads."""
    given = source(node)
    shape = [-1 if d == contest.dim else 1 for d in range(value_of(given).ndim)]
    held = graph.add_tensor(name, removed.reshape(shape))
    with graph.fx.inserting_before(node):
        closed = graph.fx.call_function(aten.masked_fill.Scalar, (given, held, contest.fill))
    node.update_arg(0, closed)
    closed.meta["val"] = value_of(given)
    return closed
