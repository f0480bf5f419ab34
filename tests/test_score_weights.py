"""Magnitudes against what a plan without the unit takes away; prices against the parameters owned."""

import pytest
import torch

from score_models import scored
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import Ranking, score
from tilecut_passes.score_weights import member_slices, price_by_parameters


def norms_that_go(graph, groups, group, power):
    """For each unit, the norm of all parameters minus that of the model without the unit, by cutting it."""
    whole = total_of(graph, power)
    gone = []
    for unit in range(group.size):
        cut = graph.copy()
        kept = [u for u in range(group.size) if u != unit]
        run_passes(cut, [Prune(PrunePlan.keep_all(graph, groups).keeping({group.name: kept}))])
        gone.append((whole - total_of(cut, power)) ** (1 / power))
    return torch.tensor(gone, dtype=torch.float64)


def total_of(graph, power):
    floats = [t.detach().double() for t in graph.tensors.values() if t.is_floating_point()]
    return float(sum(t.abs().pow(power).sum() for t in floats))


@pytest.mark.parametrize(("method", "power"), [("magnitude", 2), ("magnitude_l1", 1)])
@pytest.mark.parametrize(
    ("model", "kind"), [("bert", "heads"), ("llama", "kv_groups"), ("llama", "queries"), ("conv", "neurons")]
)
def test_the_norm_is_of_what_cutting_the_unit_takes_away(method, power, model, kind):
    graph, groups = scored(model)
    group = next(g for g in groups if g.kind == kind)
    want = Ranking.of_scores(norms_that_go(graph, groups, group, power))
    got = score(method, graph, [group], [])[group.name]
    assert got.order == want.order
    # One group alone has all parameters, and its mean is 1.
    assert got.losses == pytest.approx([loss / want.losses[0] for loss in want.losses], rel=1e-5)


def test_l1_and_l2_differ():
    graph, groups = scored("bert")
    l1, l2 = (score(method, graph, groups, []) for method in ("magnitude_l1", "magnitude"))
    assert any(l1[g.name].order != l2[g.name].order for g in groups)


def test_a_group_costs_its_part_of_the_parameters():
    graph, groups = scored("bert")
    rankings = price_by_parameters(graph, groups, {g.name: torch.ones(g.size, dtype=torch.float64) for g in groups})
    owned = {g.name: sum(s.numel() for s in member_slices(graph, g)) for g in groups}
    assert sum(r.losses[0] for r in rankings.values()) == pytest.approx(1)
    for g in groups:
        assert rankings[g.name].losses[0] == pytest.approx(owned[g.name] / sum(owned.values()))
    # q, k, v [8, 32] with biases and o [32, 8], of a head; the same of a neuron.
    heads, neurons = (next(g for g in groups if g.kind == kind) for kind in ("heads", "neurons"))
    assert owned[heads.name] == 4 * (4 * 8 * 32 + 3 * 8)
    assert owned[neurons.name] == 48 * (2 * 32 + 1)


def test_weights_that_are_all_zero_cost_nothing():
    graph, groups = scored("mlp")
    graph = graph.copy()
    for name in graph.tensors:
        graph.set_tensor(name, torch.nn.Parameter(torch.zeros_like(graph.tensor(name))))
    assert set(score("magnitude", graph, groups, [])[groups[0].name].losses) == {0.0}
