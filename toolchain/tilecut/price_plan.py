"""What a plan costs while it is being chosen: MACs, numbers, bytes, predicted milliseconds; and the limits on them.

Prices are of groups at their emitted sizes, padding included. A branch that is removed takes everything in it along. The
hidden width is part of nearly every contraction, so prices are asked for at one hidden width at a time (`at_hidden`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tilecut.config import PruneConfig
from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.count_macs import MacCounter, ParameterCounter
from tilecut_passes.enforce_head_width import EnforceHeadWidth
from tilecut_passes.search import Lattice, Limit, joined
from tilecut_runtime.errors import ConfigError
from tilecut_targets.cost_model import CostModel
from tilecut_targets.target import Target

MILLISECONDS = "milliseconds"
ATTENTION_KINDS = ("heads", "kv_groups", "queries", "qk_width", "vo_width")
WIDTHS = ("qk_width", "vo_width")
# Head widths are multiples of this at least: what vector units take.
HEAD_WIDTH = 8


@dataclass(frozen=True)
class Prices:
    """What groups cost.

    Attributes:
        groups: those that are chosen for, by name.
        pruned: counts with tokens gone; `counter` where none go.
        always: sizes of other groups that are not the dense ones: padded, or the hidden width that is being tried.
        within: name of a `layers` group -> the groups that go with it.
    """

    axes: Axes
    groups: Mapping[str, Group]
    counter: MacCounter
    pruned: MacCounter
    target: Target
    lattice: Lattice
    always: Mapping[str, int]
    within: Mapping[str, Sequence[str]]
    latency: CostModel | None = None
    hidden: Mapping[str, int] = field(default_factory=dict)

    @property
    def inner(self) -> list[str]:
        """The groups that are chosen for at one hidden width."""
        return [name for name, group in self.groups.items() if group.kind != "hidden"]

    def sets(self, config: PruneConfig) -> list[list[str]]:
        """The groups of `inner`, split into sets whose costs add up: they share no contraction, and no tensor to count."""
        sets = self.counter.groups_together(self.inner)
        if config.max_params is None and config.max_bytes is None:
            return sets
        return joined(sets, ParameterCounter(self.axes, self.counter).groups_together(self.inner))

    def at_hidden(self, sizes: Mapping[str, int]) -> Prices:
        """The prices at other hidden widths."""
        return replace(self, hidden=dict(sizes), always={**self.always, **sizes})

    def emitted(self, name: str, count: int) -> int:
        """How many units a group has in the emitted model when it keeps `count`."""
        group = self.groups[name]
        if group.kind in WIDTHS:
            return EnforceHeadWidth(multiple=self.target.head_width).wanted_size(self.axes, group, count)
        return self.lattice.emitted(group.kind, count)

    def counts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Emitted sizes of the named groups, and of those that are not chosen for."""
        return {**self.always, **{name: self.emitted(name, n) for name, n in sizes.items()}}

    def macs(self, of: Sequence[str], sizes: Mapping[str, int]) -> float:
        """MACs of the contractions that the named groups take part in."""
        return self.pruned.of_groups(of, self.counts({name: sizes[name] for name in of}))

    def milliseconds(self, of: Sequence[str], sizes: Mapping[str, int]) -> float:
        """Predicted milliseconds of the named groups' layers; at another hidden width they go with the MACs."""
        assert self.latency is not None
        gone = {name for layer in of if sizes[layer] == 0 for name in self.within.get(layer, ())}
        live = [name for name in of if self.groups[name].kind != "layers" and name not in gone]
        if not live:
            return 0.0
        own = {name: self.emitted(name, sizes[name]) for name in live}
        ms = self.latency.of(live, own)
        if not self.hidden:
            return ms
        dense = replace(self, always={n: k for n, k in self.always.items() if n not in self.hidden}, hidden={})
        return ms * self.macs(live, sizes) / dense.macs(live, sizes)

    def rest_milliseconds(self) -> float:
        """What no group takes part in: norms and sums, which go with the hidden width."""
        assert self.latency is not None
        ratios = [n / self.groups[name].size for name, n in self.hidden.items()]
        return self.latency.rest * (sum(ratios) / len(ratios) if ratios else 1.0)


def limits_of(prices: Prices, config: PruneConfig) -> list[Limit]:
    """Every budget of a config, at the hidden width of `prices`.

    Raises:
        ConfigError: a budget that this model or target has no measure of.
    """
    every, inner = list(prices.groups), prices.inner
    whole = {name: prices.groups[name].size for name in inner}
    counter = prices.counter
    limits = []
    # At 0 nothing has to go, not even what padding adds.
    if config.cut_fraction:
        budget = math.floor((1 - config.cut_fraction) * counter.of_groups(every))
        rest = prices.pruned.of_groups(every, prices.counts(whole)) - prices.macs(inner, whole)
        limits.append(Limit("prunable MACs", budget, prices.macs, rest=rest))
    if config.max_macs is not None:
        rest = prices.pruned.total(prices.always) - prices.pruned.of_groups(inner, prices.always)
        limits.append(Limit("MACs", config.max_macs, prices.macs, rest=rest))
    if config.max_latency_ms is not None:
        if prices.pruned is not counter:
            raise ConfigError(
                "PruneConfig",
                "max_latency_ms is asked for, but the latency model knows of no tokens that go",
                fix="give sparsity or max_macs, or leave tokens out",
            )
        if prices.latency is None:
            raise ConfigError(
                "PruneConfig",
                "max_latency_ms is asked for, but there is no latency model",
                fix="pass Target.cost()'s model, or give sparsity, max_macs, max_params or max_bytes",
            )
        limits.append(Limit(MILLISECONDS, config.max_latency_ms, prices.milliseconds, rest=prices.rest_milliseconds()))
    if config.attention_sparsity is not None:
        attention = {name for name in inner if prices.groups[name].kind in ATTENTION_KINDS}
        if not attention:
            raise ConfigError("PruneConfig", "attention_sparsity is asked for, but no attention can be cut")
        budget = math.floor((1 - config.attention_sparsity) * counter.of_groups([n for n in inner if n in attention]))
        limits.append(
            Limit("attention MACs", budget, lambda of, sizes: prices.macs(of, sizes) if attention & set(of) else 0.0)
        )
    for what, budget in (("parameters", config.max_params), ("bytes", config.max_bytes)):
        if budget is None:
            continue
        numbers = ParameterCounter(prices.axes, counter, in_bytes=what == "bytes")
        rest = numbers.total(prices.always) - numbers.of_groups(inner, prices.always)
        held = lambda of, sizes, numbers=numbers: numbers.of_groups(of, prices.counts({n: sizes[n] for n in of}))
        limits.append(Limit(what, budget, held, rest=rest))
    return limits
