"""Cut a little, repair, recover, and again, until the plan is reached or quality falls under a floor.

Before: a dense graph, and plans for it that each keep a part of what the one before kept. After: a graph that is cut as
the last plan says, or as the last one whose quality held. Left alone: the dense graph, which every repair and recovery
follows: not the graph before the cut, whose losses it would inherit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tilecut_passes.axes.groups import Group, Member, find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.graph import Graph
from tilecut_passes.plan import GroupPlan, PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import PlanError, RecoveryError


@dataclass
class Steps:
    """The graph that the steps ended with, and its plan, which is for the dense graph.

    Attributes:
        reached: which of the plans that is, from 0.
        qualities: after every step that was tried; the last may be below the floor.
    """

    graph: Graph
    plan: PrunePlan
    reached: int
    qualities: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prune_in_steps(
    dense: Graph,
    plans: Sequence[PrunePlan],
    repair: Callable[[Graph, PrunePlan], None],
    recover: Callable[[Graph, PrunePlan], None],
    quality: Callable[[Graph, PrunePlan], float],
    floor: float | None = None,
) -> Steps:
    """Cut by every plan in turn; `repair` and `recover` change the cut graph, and are told the plan that it is cut by.

    Raises:
        PlanError: a plan keeps what the one before did not.
        RecoveryError: the first cut already falls under the floor.
    """
    done: Steps | None = None
    qualities: list[float] = []
    for i, plan in enumerate(plans):
        graph = dense.copy() if done is None else done.graph.copy()
        run_passes(graph, [Prune(plan if done is None else relative_plan(done.plan, plan, graph))])
        repair(graph, plan)
        recover(graph, plan)
        qualities.append(quality(graph, plan))
        # Not a number is no quality either.
        if floor is not None and not qualities[-1] >= floor:
            if done is None:
                raise RecoveryError(
                    "recover",
                    "the first cut falls under the floor",
                    got=f"{qualities[-1]:.4f}",
                    wanted=f"at least {floor}",
                    fix="take more steps, train longer, or lower the floor",
                )
            done.notes.append(
                f"stopped after step {i} of {len(plans)}: the next one gives {qualities[-1]:.4f}, under the floor of "
                f"{floor}; the budget is not met"
            )
            break
        done = Steps(graph, plan, i, qualities)
    if done is None:
        raise PlanError("prune_in_steps", "no plans", got=0, wanted="at least 1")
    return done


def relative_plan(earlier: PrunePlan, later: PrunePlan, graph: Graph) -> PrunePlan:
    """The plan that cuts `graph`, which `earlier` cut, to what `later` says; both plans are for the dense graph.

    Raises:
        PlanError: `later` keeps a unit that `earlier` cut, plans other groups, or a group is not found.
    """
    found = find_groups(infer(graph))
    before = {g.name: g for g in earlier.groups}
    if before.keys() != {g.name for g in later.groups}:
        raise PlanError("relative_plan", "the two plans are for different groups")
    plan = PrunePlan.keep_all(graph, found)
    chosen: dict[str, GroupPlan] = {}
    for after in later.groups:
        was = before[after.name]
        place = {unit: i for i, unit in enumerate(was.kept)}
        if lost := [unit for unit in after.kept if unit not in place]:
            raise PlanError("relative_plan", f"{after.name} keeps a unit that was cut before", got=lost[0])
        # Padding that stays may have been trained.
        if (after.kept, after.count) == (was.kept, was.count):
            continue
        group = _now(was, found)
        here = next(g for g in plan.groups if g.name == group.name)
        chosen[group.name] = replace(here, kept=tuple(place[u] for u in after.kept), padded_to=after.padded_to)
    groups = tuple(chosen.get(g.name, g) for g in plan.groups)
    return replace(plan, groups=groups, target=later.target, at=dict(later.at), frozen=later.frozen, rotations=later.rotations)


def _now(was: GroupPlan, found: Sequence[Group]) -> Group:
    """A planned group in the graph that its plan cut.

    By the dimensions that hold it: names count, and kinds depend on, what other groups are left. Where one KV group
    stays, its queries are heads.
    """
    alike = [g for g in found if g.size == was.count and _places(g.members) == _places(was.members)]
    alike = [g for g in alike if g.kind == was.kind] or alike
    if len(alike) != 1:
        raise PlanError(
            "relative_plan",
            f"the cut graph has {'no group' if not alike else 'several groups'} like {was.name}",
            wanted=f"one of {was.count} {was.kind}",
        )
    return alike[0]


def _places(members: Sequence[Member]) -> set[tuple[str, int]]:
    return {(m.parameter, m.dim) for m in members}
