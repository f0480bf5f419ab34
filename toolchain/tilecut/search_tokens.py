"""Search how many tokens stay behind each layer, together with how many units each group keeps.

Every layer alone is first made to let tokens go, down to each of `FRACTIONS`, and what the model's outputs lose is measured
as for a cost table. A schedule (fractions that never rise, at most `MOST_DROPS` of them falling) is predicted to lose the
sum over its drops of what each adds: from f to g behind a layer, its loss at g minus its loss at f. Tokens change what all
groups cost, so schedules are tried outside of the knapsack: those that no other beats in both MACs and loss, each with the
best plan of the groups in what the budget leaves. The one whose losses together are least is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tilecut.choose_plan import Choice
from tilecut.plan_tokens import TokenSchedule
from tilecut_passes.calibration import Batch
from tilecut_passes.cost_table import table_batches
from tilecut_passes.find_token_sites import TokenStream
from tilecut_passes.graph import Graph
from tilecut_passes.mask_tokens import MaskTokens
from tilecut_passes.measure_divergence import measure_divergence
from tilecut_passes.token_plan import TokenPlan
from tilecut_runtime.errors import ConfigError

FRACTIONS = (0.75, 0.5, 0.35, 0.25)
MOST_DROPS = 2


@dataclass(frozen=True)
class TokenLosses:
    """What is lost when tokens go behind one layer alone: by the layer's name and the fraction that stays."""

    stream: TokenStream
    losses: Mapping[tuple[str, float], float]
    restored: str

    def of(self, entries: Sequence[TokenPlan]) -> float:
        """What a schedule is predicted to lose."""
        left, lost = 1.0, 0.0
        for one in entries:
            lost += max(self._at(one.after, one.keep) - self._at(one.after, left), 0.0)
            left = one.keep
        return lost

    def _at(self, name: str, fraction: float) -> float:
        return 0.0 if fraction == 1 else self.losses[name, fraction]


def measure_token_losses(
    fused: Graph,
    stream: TokenStream,
    batches: Sequence[Batch],
    outputs: Sequence[str],
    restored: str,
    progress: Callable[[int, int], None],
) -> TokenLosses:
    """Measure every layer at every fraction; a larger fraction loses no more than a smaller one.

    Args:
        fused: the dense graph, its attentions fused; left as it is.
        outputs: those that count.
    """
    used = table_batches(fused, batches, outputs)
    names = [site.name for site in stream.sites]
    losses: dict[tuple[str, float], float] = {}
    with torch.no_grad():
        dense = [{k: v for k, v in fused.run(batch.inputs).items() if k in outputs} for batch in used]
        for i, (name, fraction) in enumerate(itertools.product(names, FRACTIONS)):
            hidden = fused.copy()
            MaskTokens((TokenPlan(name, fraction, restored=restored),))(hidden)
            hidden.clean()
            found = [
                measure_divergence(want, {**want, **{k: v for k, v in hidden.run(b.inputs).items() if k in outputs}}, b)
                for want, b in zip(dense, used)
            ]
            larger = losses.get((name, FRACTIONS[FRACTIONS.index(fraction) - 1]), 0.0) if fraction < FRACTIONS[0] else 0.0
            losses[name, fraction] = max(sum(found) / len(found), larger, 0.0)
            progress(i + 1, len(names) * len(FRACTIONS))
    return TokenLosses(stream, losses, restored)


def search_tokens(
    measured: TokenLosses, macs: Callable[[TokenSchedule], int], choose: Callable[[TokenSchedule | None], Choice]
) -> Choice:
    """The choice that loses least over all schedules.

    Args:
        macs: of the whole model with a schedule and with every unit there.
        choose: the best plan of the groups under a schedule; a ConfigError where none fits the budget.

    Raises:
        ConfigError: no schedule leaves a legal model within the budget.
    """
    names = [site.name for site in measured.stream.sites]
    offered = []
    for entries in schedules(names, measured.restored):
        schedule = TokenSchedule(measured.stream, entries)
        offered.append((macs(schedule), measured.of(entries), schedule))
    best: Choice | None = None
    failure: ConfigError | None = None
    for _, loss, schedule in undominated(offered):
        if best is not None and loss >= best.loss:
            continue
        try:
            found = choose(schedule if schedule.entries else None)
        except ConfigError as e:
            failure = e
            continue
        if best is None or found.loss + loss < best.loss:
            best = replace(found, loss=found.loss + loss)
    if best is None:
        assert failure is not None
        raise failure
    return best


def schedules(names: Sequence[str], restored: str) -> Iterator[tuple[TokenPlan, ...]]:
    """Every schedule, the empty one first."""
    for drops in range(MOST_DROPS + 1):
        for places in itertools.combinations(names, drops):
            for fractions in itertools.combinations(FRACTIONS, drops):
                yield tuple(TokenPlan(name, f, restored=restored) for name, f in zip(places, fractions))


def undominated(offered: Sequence[tuple[int, float, TokenSchedule]]) -> list[tuple[int, float, TokenSchedule]]:
    """Those that no other beats in both MACs and loss, fewest MACs last."""
    kept: list[tuple[int, float, TokenSchedule]] = []
    for one in sorted(offered, key=lambda one: (one[1], one[0])):
        if not kept or one[0] < kept[-1][0]:
            kept.append(one)
    return kept
