"""From a config and scores to a plan: the budgets, the legal lattice of the target, and the search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tilecut.config import PruneConfig
from tilecut_passes.axes.groups import Group, find_frozen, find_groups
from tilecut_passes.axes.infer import Axes
from tilecut_passes.count_macs import MacCounter, count_parameters
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan
from tilecut_passes.score import Ranking
from tilecut_passes.search import Lattice, Limit, search
from tilecut_runtime.errors import ConfigError
from tilecut_targets.target import Target

ATTENTION_KINDS = ("heads", "kv_groups", "queries")
# What `num_heads_keep` counts: every attention has one of the two.
HEAD_KINDS = ("heads", "kv_groups")


@dataclass(frozen=True)
class Choice:
    """A plan, the lattice it lies on, and the MACs before and after."""

    plan: PrunePlan
    lattice: Lattice
    counter: MacCounter
    prunable: frozenset[str]

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
) -> Choice:
    """The plan that loses least within every budget of `config`.

    Raises:
        ConfigError: a budget that no legal model meets; names the smallest reachable.
    """
    names = [g.name for g in groups]
    every_group = find_groups(axes)
    counter = MacCounter(axes, every_group, config.sizes())
    lattice = target.lattice(config.block, config.power_of_two_heads)
    whole = _legal(PrunePlan.keep_all(graph, groups), graph, target, config.power_of_two_heads)
    # Head widths and groups that may not be cut are padded whatever the search does.
    always = {g.name: g.count for g in whole.groups if g.name not in set(names) and g.name in counter.leaf_of}
    sizes = search(
        groups,
        counter.groups_together(names),
        {n: r.losses for n, r in rankings.items()},
        lattice,
        _limits(graph, groups, counter, config, lattice, always),
        _fixed(groups, lattice, config),
    )
    plan = PrunePlan.keep_all(graph, groups).keeping({n: rankings[n].best(k) for n, k in sizes.items()})
    plan = _legal(plan, graph, target, config.power_of_two_heads)
    plan = replace(plan, target=str(target), at=config.sizes(), frozen=tuple(find_frozen(axes)))
    return Choice(plan, lattice, counter, frozenset(g.kind for g in groups))


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
    graph: Graph,
    groups: Sequence[Group],
    counter: MacCounter,
    config: PruneConfig,
    lattice: Lattice,
    always: Mapping[str, int],
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
        per_unit = {n: unit_numbers(graph, by_name[n], in_bytes=weight is None) for n in names}
        whole = count_parameters(graph) if weight else sum(t.numel() * t.element_size() for t in graph.tensors.values())
        fixed = whole - sum(per_unit[n] * by_name[n].size for n in names)
        taken = lambda of, sizes, per=per_unit: sum(per[n] * k for n, k in emitted(of, sizes).items())
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


def _fixed(groups: Sequence[Group], lattice: Lattice, config: PruneConfig) -> dict[str, int]:
    """Sizes that the config gives: the heads of every attention."""
    wanted = config.num_heads_keep
    if wanted is None:
        return {}
    if not any(g.kind in HEAD_KINDS for g in groups):
        raise ConfigError("PruneConfig", "num_heads_keep is asked for, but no attention can be cut")
    fixed = {}
    for group in groups:
        if group.kind not in HEAD_KINDS:
            continue
        if wanted > group.size or not lattice.allows(group.kind, wanted, group.size):
            legal = ", ".join(map(str, lattice.sizes(group.kind, group.size)))
            raise ConfigError(
                "PruneConfig", f"num_heads_keep does not fit {group.name}", got=wanted, wanted=f"one of {legal}"
            )
        fixed[group.name] = wanted
    return fixed
