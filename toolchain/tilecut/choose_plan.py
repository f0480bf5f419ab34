"""From a config and rankings to a plan: the budgets, the legal lattice of the target, and the search."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tilecut.choose_words import Words
from tilecut.config import PruneConfig
from tilecut.plan_tokens import TokenSchedule
from tilecut.price_plan import HEAD_WIDTH, MILLISECONDS, WIDTHS, Prices, limits_of
from tilecut.search_widths import latency_of, search_widths
from tilecut_passes.axes.groups import Group, find_frozen, find_groups
from tilecut_passes.axes.infer import Axes
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.count_token_macs import TokenMacCounter
from tilecut_passes.enforce_head_width import EnforceHeadWidth
from tilecut_passes.graph import Graph
from tilecut_passes.legal_sizes import Constraints, alike, legal_sizes
from tilecut_passes.plan import GroupPlan, PrunePlan
from tilecut_passes.rearrange_masks import rearrange_masks
from tilecut_passes.score import Ranking
from tilecut_passes.search import Lattice, Limit, lost
from tilecut_passes.search_fisher import search_latency, search_macs
from tilecut_runtime.errors import ConfigError
from tilecut_targets.cost_model import CostModel
from tilecut_targets.target import Target

log = logging.getLogger("tilecut.choose_plan")

# What `adapt_block` tries, largest first.
BLOCKS = (256, 128, 64, 32, 16)
# What `num_heads_keep` counts: every attention has one of the two.
HEAD_KINDS = ("heads", "kv_groups")


@dataclass(frozen=True)
class Choice:
    """A plan, the lattice it lies on, and the MACs before and after.

    `loss` is what the rankings predict is lost, `latency_ms` what the target's cost model predicts of dense and pruned
    (None without one), `block` the block that `adapt_block` found (None: not asked for), `pruned` counts with tokens gone.
    """

    plan: PrunePlan
    lattice: Lattice
    counter: MacCounter
    prunable: frozenset[str]
    loss: float = 0.0
    latency_ms: tuple[float, float] | None = None
    block: int | None = None
    pruned: MacCounter | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Units of every counted group after cutting and padding."""
        return {g.name: g.count for g in self.plan.groups if g.name in self.counter.leaf_of}

    def macs(self) -> dict[str, int]:
        """MACs of the whole model and of its prunable part, dense and pruned (padding is counted)."""
        counts, after = self.counts, self.pruned or self.counter
        names = [g.name for g in self.plan.groups if g.name in counts and g.kind in self.prunable]
        return {
            "dense": self.counter.total(),
            "pruned": after.total(counts),
            "prunable_dense": self.counter.of_groups(names),
            "prunable_pruned": after.of_groups(names, counts),
        }

    def by_kind(self) -> dict[str, dict[str, int]]:
        """What each kind gave: units before and after, and the MACs that go when it alone is cut as the plan says."""
        counts, dense = self.counts, self.counter.total()
        kinds: dict[str, list[GroupPlan]] = {}
        for group in self.plan.groups:
            kinds.setdefault(group.kind, []).append(group)
        return {
            kind: {
                "units": sum(g.size for g in own),
                "kept": sum(len(g.kept) for g in own),
                "macs": dense - self.counter.total({g.name: counts[g.name] for g in own if g.name in counts}),
            }
            for kind, own in kinds.items()
        }

    def tokens(self) -> list[dict[str, Any]]:
        """The plan's entries with numbers of tokens, and what the pruned model's MACs would be were they all there."""
        if not isinstance(self.pruned, TokenMacCounter):
            return []
        size, whole = self.pruned.tokens, self.counter.total(self.counts)
        return [{**one.as_json(), "of": size, "kept": one.count(size), "macs_with_all": whole} for one in self.plan.tokens]


def choose_plan(
    graph: Graph,
    axes: Axes,
    groups: Sequence[Group],
    rankings: Mapping[str, Ranking],
    config: PruneConfig,
    target: Target,
    latency: CostModel | None = None,
    fisher: Mapping[str, Tensor] | None = None,
    tokens: TokenSchedule | None = None,
    words: Words | None = None,
) -> Choice:
    """The plan that loses least within every budget of `config`.

    Args:
        words: what stays of the vocabulary, whatever the budget.
        latency: the target's cost model, for `max_latency_ms`.
        fisher: Fisher matrices [U, U] of the groups: search and rearrange by them, as Kwon et al. do.
        tokens: those that go on the way; budgets of MACs hold with them gone.

    Raises:
        ConfigError: a budget that no legal model meets (names the smallest reachable), or a constraint that fits nothing.
    """
    every_group = find_groups(axes)
    counter = MacCounter(axes, every_group, config.sizes())
    pruned = tokens.counter(axes, every_group, config.sizes()) if tokens is not None else counter
    whole = _legal(PrunePlan.keep_all(graph, groups), graph, target, config.power_of_two_heads)
    by_name = {g.name: g for g in groups}
    # Head widths and groups that may not be cut are padded whatever the search does.
    always = {g.name: g.count for g in whole.groups if g.name not in by_name and g.name in counter.leaf_of}
    if words is not None:
        always[words.group.name] = len(words.kept)
    within = counter.within(groups)
    asked = constraints(axes, groups, config, target)
    curves = {name: ranking.losses for name, ranking in rankings.items()}

    def prices_on(lattice: Lattice) -> Prices:
        return Prices(axes, by_name, counter, pruned, target, lattice, always, within, latency)

    def sizes_on(lattice: Lattice) -> dict[str, int]:
        prices, sizes = prices_on(lattice), legal_sizes(groups, lattice, asked)
        if not groups:
            return {}
        if fisher is not None:
            sets = counter.groups_together(list(by_name))
            return _by_fisher(groups, sets, fisher, sizes, limits_of(prices, config), config)
        return search_widths(prices, config, curves, sizes, alike(groups, asked))

    block, lattice = config.block, target.lattice(config.block, config.power_of_two_heads)
    sizes = sizes_on(lattice)
    if config.adapt_block is not None:
        allowed = lost(curves, sizes, within) * (1 + config.adapt_block)
        for wanted in BLOCKS:
            coarse = target.lattice(wanted, config.power_of_two_heads)
            try:
                found = sizes_on(coarse)
            except ConfigError as e:
                log.debug("block %d: %s", wanted, e)
                continue
            if lost(curves, found, within) <= allowed:
                block, lattice, sizes = wanted, coarse, found
                break
    kept = {n: rankings[n].best(k) for n, k in sizes.items()}
    if fisher is not None:
        kept = rearrange_masks(kept, fisher)
    plan = PrunePlan.keep_all(graph, groups).keeping(kept)
    if words is not None:
        plan = _with_words(plan, graph, words)
    plan = _legal(plan, graph, target, config.power_of_two_heads)
    entries = tokens.entries if tokens is not None else ()
    plan = replace(plan, target=str(target), at=config.sizes(), frozen=tuple(find_frozen(axes)), tokens=entries)
    predicted = None
    # The cost model was measured with every token there.
    if latency is not None and not entries:
        prices = prices_on(lattice)
        predicted = latency_of(prices, {n: g.size for n, g in by_name.items()}), latency_of(prices, sizes)
    return Choice(
        plan,
        lattice,
        counter,
        frozenset(g.kind for g in groups),
        lost(curves, sizes, within),
        predicted,
        block if config.adapt_block is not None else None,
        pruned,
    )


def _with_words(plan: PrunePlan, graph: Graph, words: Words) -> PrunePlan:
    (whole,) = PrunePlan.keep_all(graph, [words.group]).groups
    return replace(plan, groups=(*plan.groups, replace(whole, kept=words.kept, unknown=words.unknown)))


def constraints(axes: Axes, groups: Sequence[Group], config: PruneConfig, target: Target) -> Constraints:
    """What the config asks of the sizes, and heads' widths that the target takes without padding.

    Raises:
        ConfigError: num_heads_keep where no attention can be cut.
    """
    fixed = {}
    if config.num_heads_keep is not None:
        fixed = {g.name: config.num_heads_keep for g in groups if g.kind in HEAD_KINDS}
        if not fixed:
            raise ConfigError("PruneConfig", "num_heads_keep is asked for, but no attention can be cut")
    width = EnforceHeadWidth(multiple=math.lcm(HEAD_WIDTH, target.head_width))
    allows = lambda group, n: group.kind not in WIDTHS or width.wanted_size(axes, group, n) == n
    return Constraints(config.keep, fixed, config.min_units, config.max_units, config.uniform, allows)


def _by_fisher(
    groups: Sequence[Group],
    sets: Sequence[Sequence[str]],
    fisher: Mapping[str, Tensor],
    sizes: Mapping[str, Sequence[int]],
    limits: Sequence[Limit],
    config: PruneConfig,
) -> dict[str, int]:
    """The mask search of Kwon et al., which knows no groups that must be alike."""
    if config.uniform:
        raise ConfigError("PruneConfig", "uniform is not for method='fisher'", fix="use method='table'")
    scores = {name: matrix.diagonal() for name, matrix in fisher.items()}
    latency = next((limit for limit in limits if limit.what == MILLISECONDS), None)
    if latency is None:
        return search_macs(groups, sets, scores, sizes, limits)
    return search_latency(groups, sets, scores, sizes, latency, [limit for limit in limits if limit is not latency])


def _legal(plan: PrunePlan, graph: Graph, target: Target, powers: bool | None) -> PrunePlan:
    """The plan with the padding that the target needs: what the search priced as `Lattice.emitted`."""
    for enforce in target.enforce(powers):
        plan = enforce.on_plan(plan, graph)
    return plan


def keep_everything(graph: Graph, axes: Axes, groups: Sequence[Group], at: dict[str, int], target: Target) -> Choice:
    """The plan of a dense compile."""
    plan = _legal(PrunePlan.keep_all(graph, groups), graph, target, None)
    plan = replace(plan, target=str(target), at=at, frozen=tuple(find_frozen(axes)))
    return Choice(plan, target.lattice(), MacCounter(axes, find_groups(axes), at), frozenset(g.kind for g in groups))
