"""Search with the hidden width outside: one knapsack for every legal hidden width, and the best of them.

The hidden width multiplies what every other group costs, so that costs at different hidden widths do not add up in one
knapsack; at one of them they do. Head widths multiply their own layer's costs alone, and are enumerated with its heads
as one option each: exact, and different layers may have different ones.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence

from tilecut.config import PruneConfig
from tilecut.price_plan import Prices, limits_of
from tilecut_passes.cost_table import grid
from tilecut_passes.search import lost, search
from tilecut_runtime.errors import ConfigError

log = logging.getLogger("tilecut.search_widths")

# Hidden widths that are tried of a model with one; those of several (encoder and decoder) share about as many pairs.
MOST_WIDTHS = 24


def search_widths(
    prices: Prices,
    config: PruneConfig,
    curves: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Sequence[int]],
    alike: Sequence[Sequence[str]],
) -> dict[str, int]:
    """How many units every group keeps: legal, within every budget, and losing least.

    Raises:
        ConfigError: no legal model is within the budgets.
    """
    inner = [prices.groups[name] for name in prices.inner]
    names = [group.name for group in inner]
    sets = prices.sets(config)
    own = [one for one in alike if set(one) <= set(names)]
    best: dict[str, int] | None = None
    least = float("inf")
    why: ConfigError | None = None
    for widths in _hidden_widths(prices, sizes, alike):
        try:
            limits = limits_of(prices.at_hidden(widths), config)
            found = search(inner, sets, curves, sizes, limits, own, prices.within)
        except ConfigError as e:
            # The smallest width comes last: its refusal names the smallest model.
            why = e
            continue
        total = lost(curves, {**widths, **found}, prices.within)
        log.debug("hidden %s: loss %.4g", widths, total)
        if total < least:
            best, least = {**widths, **found}, total
    if best is None:
        assert why is not None
        raise why
    return {name: best[name] for name in prices.groups}


def latency_of(prices: Prices, sizes: Mapping[str, int]) -> float:
    """Predicted milliseconds of a whole model."""
    widths = {name: n for name, n in sizes.items() if prices.groups[name].kind == "hidden"}
    tried = prices.at_hidden(widths)
    sets = prices.counter.groups_together(prices.inner)
    return tried.rest_milliseconds() + sum(tried.milliseconds(names, sizes) for names in sets)


def _hidden_widths(
    prices: Prices, sizes: Mapping[str, Sequence[int]], alike: Sequence[Sequence[str]]
) -> list[dict[str, int]]:
    """The hidden widths to try, the widest first; {} where there is none to choose."""
    names = [name for name, group in prices.groups.items() if group.kind == "hidden"]
    if not names:
        return [{}]
    each = max(2, round(MOST_WIDTHS ** (1 / len(names))))
    tried = [[*grid(sizes[name], each - 1), max(sizes[name])] for name in names]
    found = [dict(zip(names, one)) for one in itertools.product(*(reversed(one) for one in tried))]
    return [one for one in found if all(len({one[n] for n in same if n in one}) <= 1 for same in alike)]
