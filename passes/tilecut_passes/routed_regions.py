"""Find where tokens are sorted by the expert that they go to and put back, and see that they do not mix there.

A region begins at a top-k over [tokens, experts] and ends where everything that depends on it has come together again, at
a tensor whose rows are the tokens' in their order (k rows a token, or one). Its ops (sort, index, cumsum, products of
groups of rows) mix tokens each for itself. That the region as a whole does not is seen by running it on random rows: fewer
tokens, and tokens in another order, must give the same rows.
"""

from __future__ import annotations

from collections.abc import Collection

import sympy
import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, is_call, number_of, sizes_of, value_of
from tilecut_passes.mask_probes import ProbeError
from tilecut_passes.tabulate_positions import Whole, alike

aten = torch.ops.aten
# Tokens that a region is run on.
TOKENS = 7


def routed_regions(
    graph: Graph, reached: Collection[fx.Node], batch: sympy.Symbol, length: sympy.Symbol
) -> set[fx.Node]:
    """The nodes of all regions that leave tokens apart; `reached` are the nodes that depend on tokens."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_call(node, aten.topk.default) and node in reached and node not in found:
            region = _region(graph, node)
            if region and _keeps_apart(graph, region, reached, batch, length):
                found |= set(region)
    return found


def _region(graph: Graph, start: fx.Node) -> list[fx.Node]:
    """From a node to the first one that all its consequences go through, both included; [] where there is none."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    region, waiting = [start], set(start.users)
    while waiting:
        node = min(waiting, key=order.__getitem__)
        waiting.discard(node)
        if node.op == "output":
            return []
        region.append(node)
        # Nothing else is left to come: this is where they meet, once it is a row for every token.
        value = value_of(node)
        if not waiting and isinstance(value, Tensor) and value.ndim > 1:
            return region
        waiting |= set(node.users) - set(region)
    return []


def _keeps_apart(
    graph: Graph, region: list[fx.Node], reached: Collection[fx.Node], batch: sympy.Symbol, length: sympy.Symbol
) -> bool:
    """Whether fewer tokens, and tokens in another order, give the same rows."""
    read = dict.fromkeys(x for n in region for x in n.all_input_nodes if x not in region and x in reached)
    entries = [x for x in read if isinstance(value_of(x), Tensor)]
    at = {batch: 1, length: TOKENS}
    generator = torch.Generator().manual_seed(0)
    whole: dict[fx.Node, Tensor] = {}
    for node in entries:
        sizes = sizes_of(value_of(node))
        if not value_of(node).is_floating_point() or not sizes or sizes[0] != batch * length:
            return False
        shape = [number_of(s, at) for s in sizes]
        whole[node] = torch.rand(shape, generator=generator, dtype=value_of(node).dtype)
    order = torch.randperm(TOKENS, generator=generator)
    try:
        want = _run(graph, region[-1], whole, at)
        fewer = _run(graph, region[-1], {n: x[: TOKENS - 3] for n, x in whole.items()}, {batch: 1, length: TOKENS - 3})
        turned = _run(graph, region[-1], {n: x[order] for n, x in whole.items()}, at)
    except ProbeError:
        return False
    if want.shape[0] % TOKENS:
        return False
    want, turned = (x.unflatten(0, (TOKENS, -1)) for x in (want, turned))
    fewer = fewer.unflatten(0, (TOKENS - 3, -1))
    return alike(fewer, want[: TOKENS - 3]) and alike(turned, want[order])


def _run(graph: Graph, end: fx.Node, given: dict[fx.Node, Tensor], at: dict[sympy.Symbol, int]) -> Tensor:
    """The value of a region's end, given those of what it reads."""
    run = Whole(graph, at, {})
    run.known.update(given)
    return run(end)
