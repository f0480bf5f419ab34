"""Let the hidden width shrink where the model returns its residual stream: a layer back to the caller's width.

Before: an output [.., H] of channels that are normed, and that only the caller's view of them freezes.
After: it is linear(stream, W) with W = I [H, H], so that the stream's channels are contracted like any others, the numbers
stay, and the output keeps its width when channels go: W loses columns, and `reconstruct` refits it.
Left alone: outputs whose channels are frozen for another reason, or are not the last dimension.

`DropProjections` takes the layers away where nothing went: after it the graph is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from tilecut_passes.axes.infer import RETURNED, infer
from tilecut_passes.graph import Graph, calls_before, is_call, source, value_of

aten = torch.ops.aten
PREFIX = "tilecut_projection_"


class ProjectOutputs:
    """Put an identity layer before every output that the residual stream is. Idempotent."""

    def __call__(self, graph: Graph) -> int:
        """Insert the layers; returns how many there are more."""
        before = len(_projections(graph))
        axes = infer(graph)
        end = graph.fx.output_node()
        results: dict[fx.Node, fx.Node] = {}
        for name, result in zip(graph.outputs, graph.results):
            types = axes.of[result]
            leaves = types[-1].leaves if types else []
            stream = bool(leaves) and all("norm" in leaf.roles and leaf.frozen == RETURNED for leaf in leaves)
            if name in graph.states.values() or result in results or not stream or not types[-1].root.is_static:
                continue
            weight = nn.Parameter(torch.eye(int(types[-1].root.size), dtype=value_of(result).dtype), requires_grad=False)
            held = graph.add_tensor(f"{PREFIX}{len(results)}.weight", weight)
            with calls_before(graph, end) as call:
                results[result] = call(aten.linear.default, result, held)
        end.args = (tuple(results.get(one, one) for one in graph.results),)
        if results:
            # Channels that something else freezes gain nothing by a layer.
            axes = infer(graph)
            stuck = [n for n in _projections(graph) if any(leaf.frozen for leaf in axes.input(n)[-1].leaves)]
            _remove(graph, stuck)
        return len(_projections(graph)) - before


class DropProjections:
    """Take away the layers of `ProjectOutputs` that are still identities. Idempotent."""

    def __call__(self, graph: Graph) -> int:
        """Remove them; returns how many."""
        same = []
        for node in _projections(graph):
            weight = graph.tensor(str(source(node, 1).target))
            if torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype, device=weight.device)):
                same.append(node)
        _remove(graph, same)
        return len(same)


def without_projections(graph: Graph) -> Graph:
    """The graph without identities: the model as the caller has it."""
    if not _projections(graph):
        return graph
    plain = graph.copy()
    DropProjections()(plain)
    return plain


def is_projection(node: fx.Node) -> bool:
    """Whether a call is a layer that `ProjectOutputs` put in."""
    return is_call(node, aten.linear.default) and str(source(node, 1).target).startswith(PREFIX)


def is_whole_projection(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is such a layer's weight, and the hidden width is what it was: then it need not be there."""
    return name.startswith(PREFIX) and shape[0] == shape[1]


def _projections(graph: Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if is_projection(node)]


def _remove(graph: Graph, nodes: list[fx.Node]) -> None:
    for node in nodes:
        node.replace_all_uses_with(source(node))
        graph.fx.erase_node(node)
    graph.clean()
