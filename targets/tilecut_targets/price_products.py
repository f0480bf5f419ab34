"""A cost model that is calculated: every product of a model priced alone, and the prices added up.

A chip's model says what a product with a weight costs and what one of attention's two; here the products of every set
of groups are priced at a grid of legal sizes, as the tables of `cost_model.py`. Norms, activations and launches are in no
product: the milliseconds are for ranking shapes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import Axes
from tilecut_passes.count_macs import MacCounter, MacTerm
from tilecut_runtime.errors import ConfigError
from tilecut_targets.cost_model import CALCULATED, CostModel, LayerTable

# Sizes of a layer that are priced one by one; of more, an even choice is, and those between are interpolated.
MOST_POINTS = 2048
# Milliseconds of [m, k] x [k, n].
ProductMs = Callable[[int, int, int], float]
# Milliseconds of one of attention's two products: that many [queries, inner] x [inner, outer].
AttentionMs = Callable[[int, int, int, int], float]


def price_products(
    axes: Axes,
    groups: Sequence[Group],
    sets: Sequence[Sequence[str]],
    at: Mapping[str, int],
    legal: Callable[[Group], list[int]],
    product_ms: ProductMs,
    attention_ms: AttentionMs,
    facts: Mapping[str, Any],
    note: str,
) -> CostModel:
    """The cost model of a captured model; see `Target.cost`.

    Args:
        legal: the sizes that a group may have after padding.
        facts: what was calculated for.
        note: what the reader of a report should know.

    Raises:
        ConfigError: there are no groups.
    """
    if not sets:
        raise ConfigError("latency", "no group of the model can be cut: there is no latency to choose")
    counter = MacCounter(axes, find_groups(axes), at)
    by_name = {g.name: g for g in groups}

    nodes = {n.name: n for n in axes.graph.nodes}
    dense = {term for term in counter.terms if not axes.weights.isdisjoint(nodes[term.node].all_input_nodes)}

    def price(term: MacTerm, counts: Mapping[str, int]) -> float:
        *outer, n, k = counter.sizes_of(term, counts)
        if term in dense:
            return product_ms(math.prod(outer), n, k)
        *programs, m = outer or [1]
        return attention_ms(math.prod(programs), m, k, n)

    def cost(terms: Sequence[MacTerm], counts: Mapping[str, int]) -> float:
        return sum(price(term, counts) for term in terms)

    tables: dict[tuple, LayerTable] = {}
    layers = []
    for names in sets:
        grid = _grid([legal(by_name[name]) for name in names])
        terms = counter.terms_of(names)
        signature = tuple((t in dense, *counter.sizes_of(t)) for t in terms), tuple(grid)
        if signature not in tables:
            ms = [cost(terms, dict(zip(names, point))) for point in itertools.product(*grid)]
            tables[signature] = LayerTable(
                [by_name[name].kind for name in names],
                grid,
                np.array(ms).reshape([len(sizes) for sizes in grid]),
                f"{len(terms)} products, {'x'.join(str(sizes[-1]) for sizes in grid)}",
            )
        layers.append((tuple(names), tables[signature]))
    priced = {term for names in sets for term in counter.terms_of(names)}
    rest = cost([t for t in counter.terms if t not in priced], {})
    return CostModel(
        "ms",
        rest,
        1.0,
        tuple(layers),
        facts={**facts, "sizes": dict(at), "clock": CALCULATED},
        notes=(note,),
    )


def _grid(legal: Sequence[list[int]]) -> tuple[tuple[int, ...], ...]:
    """Every legal size, or an even choice with the least and the greatest where that is too many points."""
    points = max(2, int(MOST_POINTS ** (1 / len(legal))))
    chosen = []
    for sizes in legal:
        places = np.linspace(0, len(sizes) - 1, min(points, len(sizes))).round().astype(int)
        chosen.append(tuple(sizes[i] for i in sorted(set(places.tolist()))))
    return tuple(chosen)
