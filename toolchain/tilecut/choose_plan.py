"""From a config and rankings to a plan: the budgets, the legal lattice of the target, and the search."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tilecut.choose_words import Words
from tilecut.config import PruneConfig
from tilecut_passes.axes.groups import Group, find_frozen, find_groups
from tilecut_passes.axes.infer import Axes
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.count_parameters import ParameterCounter
from tilecut_passes.graph import Graph
from tilecut_passes.legal_sizes import Constraints, alike, legal_sizes
from tilecut_passes.plan import PrunePlan
from tilecut_passes.rearrange_masks import rearrange_masks
from tilecut_passes.score import Ranking
from tilecut_passes.search import Lattice, Limit, search
from tilecut_passes.search_fisher import search_latency, search_macs
from tilecut_runtime.errors import ConfigError
from tilecut_targets.cost_model import CostModel
from tilecut_targets.target import Target

log = logging.getLogger("tilecut.choose_plan")

# What `adapt_block` tries, largest first.
BLOCKS = (256, 128, 64, 32, 16)
MILLISECONDS = "milliseconds"
ATTENTION_KINDS = ("heads", "kv_groups", "queries")
# What `num_heads_keep` counts: every attention has one of the two.
HEAD_KINDS = ("heads", "kv_groups")


@dataclass(frozen=True)
class Choice:
    """A plan, the lattice it lies on, and the MACs before and after.

    `loss` is what the rankings predict is lost, `latency_ms` what the target's cost model predicts of dense and pruned
    (None without one), `block` the block that `adapt_block` found (None: not asked for).
    """

    plan: PrunePlan
    lattice: Lattice
    counter: MacCounter
    prunable: frozenset[str]
    loss: float = 0.0
    latency_ms: tuple[float, float] | None = None
    block: int | None = None

    def macs(self) -> dict[str, int]:
        """MACs of the whole model and of its prunable part, dense and pruned (padding is counted)."""
        counts = {g.name: g.count for g in self.plan.groups if g.name in self.counter.leaf_of}
        names = [g.name for g in self.plan.groups if g.name in self.counter.leaf_of and g.kind in self.prunable]
        return {
            "dense": self.counter.total(),
            "pruned": self.counter.total(counts),
            "prunable_dense": self.counter.of_groups(names),
            "prunable_pruned": self.counter.of_groups(names, counts),
        }


def choose_plan(
    graph: Graph,
    axes: Axes,
    groups: Sequence[Group],
    rankings: Mapping[str, Ranking],
    config: PruneConfig,
    target: Target,
    latency: CostModel | None = None,
    fisher: Mapping[str, Tensor] | None = None,
    words: Words | None = None,
) -> Choice:
    """The plan that loses least within every budget of `config`.

    Args:
        words: what stays of the vocabulary, whatever the budget.
        latency: the target's cost model, for `max_latency_ms`.
        fisher: Fisher matrices [U, U] of the groups: search and rearrange by them, as Kwon et al. do.

    Raises:
        ConfigError: a budget that no legal model meets (names the smallest reachable), or a constraint that fits nothing.
    """
    names = [g.name for g in groups]
    every_group = find_groups(axes)
    counter = MacCounter(axes, every_group, config.sizes())
    whole = _legal(PrunePlan.keep_all(graph, groups), graph, target, config.power_of_two_heads)
    # Head widths and groups that may not be cut are padded whatever the search does.
    always = {g.name: g.count for g in whole.groups if g.name not in set(names) and g.name in counter.leaf_of}
    if words is not None:
        always[words.group.name] = len(words.kept)

    def sizes_on(lattice: Lattice) -> dict[str, int]:
        asked = constraints(groups, config)
        sizes, sets = legal_sizes(groups, lattice, asked), counter.groups_together(names)
        limits = _limits(axes, groups, counter, config, lattice, always, latency)
        if config.max_params is not None or config.max_bytes is not None:
            sets = ParameterCounter(axes, every_group).groups_together(sets)
        if not groups:
            return {}
        if fisher is not None:
            return _by_fisher(groups, sets, fisher, sizes, limits, config)
        return search(groups, sets, {n: r.losses for n, r in rankings.items()}, sizes, limits, alike(groups, asked))

    def lost(sizes: Mapping[str, int]) -> float:
        return sum(rankings[n].losses[k] for n, k in sizes.items())

    block, lattice = config.block, target.lattice(config.block, config.power_of_two_heads)
    sizes = sizes_on(lattice)
    if config.adapt_block is not None:
        allowed = lost(sizes) * (1 + config.adapt_block)
        for wanted in BLOCKS:
            coarse = target.lattice(wanted, config.power_of_two_heads)
            try:
                found = sizes_on(coarse)
            except ConfigError as e:
                log.debug("block %d: %s", wanted, e)
                continue
            if lost(found) <= allowed:
                block, lattice, sizes = wanted, coarse, found
                break
    kept = {n: rankings[n].best(k) for n, k in sizes.items()}
    if fisher is not None:
        kept = rearrange_masks(kept, fisher)
    plan = PrunePlan.keep_all(graph, groups).keeping(kept)
    if words is not None:
        plan = _with_words(plan, graph, words)
    plan = _legal(plan, graph, target, config.power_of_two_heads)
    plan = replace(plan, target=str(target), at=config.sizes(), frozen=tuple(find_frozen(axes)))
    predicted = None
    if latency is not None:
        full = {g.name: lattice.emitted(g.kind, g.size) for g in groups}
        cut = {g.name: lattice.emitted(g.kind, sizes[g.name]) for g in groups}
        predicted = latency.total(full), latency.total(cut)
    return Choice(
        plan,
        lattice,
        counter,
        frozenset(g.kind for g in groups),
        lost(sizes),
        predicted,
        block if config.adapt_block is not None else None,
    )


def _with_words(plan: PrunePlan, graph: Graph, words: Words) -> PrunePlan:
    (whole,) = PrunePlan.keep_all(graph, [words.group]).groups
    return replace(plan, groups=(*plan.groups, replace(whole, kept=words.kept, unknown=words.unknown)))


def constraints(groups: Sequence[Group], config: PruneConfig) -> Constraints:
    """What the config asks of the sizes.

    Raises:
        ConfigError: num_heads_keep where no attention can be cut.
    """
    fixed = {}
    if config.num_heads_keep is not None:
        fixed = {g.name: config.num_heads_keep for g in groups if g.kind in HEAD_KINDS}
        if not fixed:
            raise ConfigError("PruneConfig", "num_heads_keep is asked for, but no attention can be cut")
    return Constraints(config.keep, fixed, config.min_units, config.max_units, config.uniform)


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


def _limits(
    axes: Axes,
    groups: Sequence[Group],
    counter: MacCounter,
    config: PruneConfig,
    lattice: Lattice,
    always: Mapping[str, int],
    latency: CostModel | None,
) -> list[Limit]:
    names = [g.name for g in groups]
    by_name = {g.name: g for g in groups}
    prunable = counter.of_groups(names)
    limits = []

    def macs(of: Sequence[str], sizes: Mapping[str, int]) -> float:
        return counter.of_groups(of, {**always, **emitted(of, sizes)})

    def emitted(of: Sequence[str], sizes: Mapping[str, int]) -> dict[str, int]:
        return {n: lattice.emitted(by_name[n].kind, sizes[n]) for n in of}

    # At 0 nothing has to go, not even what padding adds.
    if config.cut_fraction:
        limits.append(Limit("prunable MACs", math.floor((1 - config.cut_fraction) * prunable), macs))
    if config.max_macs is not None:
        limits.append(
            Limit("MACs", config.max_macs, macs, rest=counter.total(always) - counter.of_groups(names, always))
        )
    if config.max_latency_ms is not None:
        if latency is None:
            raise ConfigError(
                "PruneConfig",
                "max_latency_ms is asked for, but there is no latency model",
                fix="pass Target.cost()'s model, or give sparsity, max_macs, max_params or max_bytes",
            )
        model = latency
        milliseconds = lambda of, sizes: model.of(of, emitted(of, sizes))
        limits.append(Limit(MILLISECONDS, config.max_latency_ms, milliseconds, rest=model.rest))
    if config.attention_sparsity is not None:
        attention = {n for n in names if by_name[n].kind in ATTENTION_KINDS}
        if not attention:
            raise ConfigError("PruneConfig", "attention_sparsity is asked for, but no attention can be cut")
        budget = math.floor((1 - config.attention_sparsity) * counter.of_groups([n for n in names if n in attention]))
        limits.append(
            Limit("attention MACs", budget, lambda of, sizes: macs(of, sizes) if attention.issuperset(of) else 0.0)
        )
    for what, budget, weight in (("parameters", config.max_params, 1), ("bytes", config.max_bytes, None)):
        if budget is None:
            continue
        numbers = ParameterCounter(axes, find_groups(axes), in_bytes=weight is None)
        taken = lambda of, sizes, count=numbers: count.of_groups(of, {**always, **emitted(of, sizes)})
        fixed = numbers.total(always) - numbers.of_groups(names, always)
        limits.append(Limit(what, budget, taken, rest=fixed))
    return limits


def unit_numbers(graph: Graph, group: Group, in_bytes: bool = False) -> int:
    """How many numbers (or bytes) one unit of a group owns."""
    total = 0
    for member in group.members:
        tensor = graph.tensor(member.parameter)
        if tensor.is_floating_point():
            numbers = tensor.numel() // tensor.shape[member.dim] * math.prod(member.view) // member.view[member.axis]
            total += numbers * (tensor.element_size() if in_bytes else 1)
    return total
