import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import bert_graph
from tilecut.choose_plan import choose_plan, keep_everything, unit_numbers
from tilecut.config import PruneConfig
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.count_macs import MacCounter, count_parameters
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import score
from tilecut_runtime.errors import ConfigError
from tilecut_targets.find_target import find_target

GRAPH = bert_graph(width=16, neurons=256)
AXES = infer(GRAPH)
GROUPS = [g for g in find_groups(AXES) if g.kind in PruneConfig().kinds]
RANKINGS = score("magnitude", GRAPH, GROUPS, [])
EDGE = find_target("edge")


def choose(target=EDGE, **config):
    return choose_plan(GRAPH, AXES, GROUPS, RANKINGS, PruneConfig(**config), target)


def kept(choice, kind):
    return [len(g.kept) for g in choice.plan.groups if g.kind == kind]


@settings(max_examples=30)
@given(st.floats(0.01, 0.55), st.sampled_from(["edge", "cuda", "ascend"]))
def test_the_plan_is_legal_and_within_the_budget(sparsity, target):
    choice = choose(find_target(target), sparsity=sparsity)
    macs = choice.macs()
    assert macs["prunable_pruned"] <= (1 - sparsity) * macs["prunable_dense"]
    for group in choice.plan.groups:
        assert choice.lattice.allows(group.kind, len(group.kept), group.size)


def test_nothing_goes_at_sparsity_zero():
    choice = choose(sparsity=0.0)
    assert all(len(g.kept) == g.size for g in choice.plan.groups)


def test_the_callers_block_meets_the_targets():
    # The dense size is legal whatever the block: 256 is no multiple of 48.
    assert all(n % 48 == 0 or n == 256 for n in kept(choose(block=48, sparsity=0.5), "neurons"))
    assert all(n % 128 == 0 for n in kept(choose(find_target("ascend"), block=64, sparsity=0.5), "neurons"))


def test_parameters_and_bytes_of_the_pruned_graph_meet_their_budget():
    dense = count_parameters(GRAPH)
    budget = dense - sum(unit_numbers(GRAPH, g) * g.size for g in GROUPS) // 2
    for config in (
        {"max_params": budget},
        {"max_bytes": 4 * budget + sum(b.numel() * 8 for b in GRAPH.tensors.values() if b.dtype == torch.int64)},
    ):
        choice = choose(**config)
        pruned = GRAPH.copy()
        run_passes(pruned, [Prune(choice.plan)])
        assert 0.9 * budget < count_parameters(pruned) <= budget


def test_max_macs_counts_the_whole_model():
    dense = choose(sparsity=0.0).macs()
    budget = dense["dense"] - dense["prunable_dense"] // 3
    assert 0.85 * budget < choose(max_macs=budget).macs()["pruned"] <= budget


def test_attention_sparsity_counts_attention_alone():
    choice = choose(attention_sparsity=0.5)
    assert kept(choice, "neurons") == [256, 256]
    assert sum(kept(choice, "heads")) == 4


def test_heads_to_keep_and_powers_of_two():
    assert kept(choose(num_heads_keep=3), "heads") == [3, 3]
    assert set(kept(choose(sparsity=0.6, power_of_two_heads=True), "heads")) <= {1, 2, 4}
    with pytest.raises(ConfigError, match="num_heads_keep does not fit .*; got 3; wanted one of 1, 2, 4"):
        choose(num_heads_keep=3, power_of_two_heads=True)
    with pytest.raises(ConfigError, match="num_heads_keep does not fit .*; got 5"):
        choose(num_heads_keep=5)


@pytest.mark.parametrize("config", [{"max_macs": 1000}, {"max_params": 1000}, {"max_bytes": 1000}, {"sparsity": 0.999}])
def test_a_budget_that_no_legal_model_meets_names_the_smallest(config):
    with pytest.raises(ConfigError, match=r"no legal model fits the budget .* the smallest legal one has [\d,]+"):
        choose(**config)


def test_padding_is_priced():
    graph = bert_graph(width=12, neurons=40)
    axes = infer(graph)
    groups = [g for g in find_groups(axes) if g.kind in ("heads", "neurons")]
    rankings = score("magnitude", graph, groups, [])
    for config in (PruneConfig(sparsity=0.0), PruneConfig(sparsity=0.25), PruneConfig(max_macs=4_400_000)):
        choice = choose_plan(graph, axes, groups, rankings, config, find_target("cuda"))
        pruned = graph.copy()
        run_passes(pruned, [Prune(choice.plan)])
        assert [e(pruned) for e in find_target("cuda").enforce()] == [0, 0]
        # Heads of 12 became 16 wide and 40 neurons 64, and what was counted is what is there.
        emitted = infer(pruned)
        assert {g.size for g in find_groups(emitted) if g.kind == "neurons"} == {64}
        assert choice.macs()["pruned"] == MacCounter(emitted, find_groups(emitted), config.sizes()).total()
        if config.max_macs is not None:
            assert choice.macs()["pruned"] <= config.max_macs < choice.macs()["dense"]
        if config.sparsity == 0.0:
            assert all(len(g.kept) == g.size for g in choice.plan.groups)
    heads = find_target("edge").lattice(power_of_two_heads=True)
    assert [heads.emitted("heads", n) for n in (1, 5, 6, 8)] == [1, 8, 8, 8]
    assert heads.emitted("neurons", 40) == 48


def test_the_best_units_stay():
    choice = choose(sparsity=0.5)
    for group in choice.plan.groups:
        assert group.kept == RANKINGS[group.name].best(len(group.kept))


def test_a_dense_plan_keeps_all():
    choice = keep_everything(GRAPH, AXES, GROUPS, PruneConfig().sizes(), EDGE)
    macs = choice.macs()
    assert macs["dense"] == macs["pruned"] and macs["prunable_dense"] == macs["prunable_pruned"]
    assert choice.plan.target == "edge"
