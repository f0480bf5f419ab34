import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import bert_graph
from tilecut.choose_plan import choose_plan, keep_everything
from tilecut.config import PruneConfig
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.count_macs import MacCounter, ParameterCounter, count_parameters
from tilecut_passes.prune import Prune
from tilecut_passes.rearrange_masks import removal_loss
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import Ranking, score
from tilecut_runtime.errors import ConfigError
from tilecut_targets.cost_model import CostModel, LayerTable
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
    counter = MacCounter(AXES, GROUPS, PruneConfig().sizes())
    budget = dense - ParameterCounter(AXES, counter).of_groups([g.name for g in GROUPS]) // 2
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


def test_groups_to_keep_and_bounds_are_kept():
    choice = choose(sparsity=0.3, keep=("*layer.0*",), min_units={"heads": 2}, max_units={"neurons": 240})
    sizes = {g.name: len(g.kept) for g in choice.plan.groups}
    assert all(sizes[g.name] == g.size for g in GROUPS if "layer.0" in g.name)
    assert sizes["encoder.layer.1.attention:heads"] >= 2 and sizes["encoder.layer.1:neurons"] <= 240


def test_uniform_groups_keep_equally_many():
    choice = choose(sparsity=0.6, uniform=True)
    assert len(set(kept(choice, "heads"))) == len(set(kept(choice, "neurons"))) == 1
    macs = choice.macs()
    assert macs["prunable_pruned"] <= 0.4 * macs["prunable_dense"]
    assert choose(sparsity=0.6).loss <= choice.loss


def test_powers_of_two_and_blocks_hold_together_with_uniform():
    choice = choose(sparsity=0.5, uniform=True, power_of_two_heads=True, block=64)
    assert all(n in (1, 2, 4) for n in kept(choice, "heads")) and all(n % 64 == 0 for n in kept(choice, "neurons"))


def test_adapt_block_takes_the_largest_that_loses_little():
    own = choose(sparsity=0.5)
    free, strict = choose(sparsity=0.5, adapt_block=1e9), choose(sparsity=0.5, adapt_block=0.0)
    assert own.block is None
    # 256 neurons: with a block of 256 none of them can go, and the heads alone are not half of the MACs.
    assert free.block == 128 and all(n % 128 == 0 for n in kept(free, "neurons"))
    assert strict.block is not None and strict.loss <= own.loss * (1 + 1e-6) and strict.block <= free.block
    between = choose(sparsity=0.5, adapt_block=0.3)
    assert between.loss <= 1.3 * own.loss + 1e-9


def linear_cost():
    """A cost model in which a head takes 1 ms and 16 neurons take 1 ms, and 5 ms are fixed."""
    tables = {
        "heads": LayerTable(["heads"], [[1, 4]], [1.0, 4.0]),
        "neurons": LayerTable(["neurons"], [[16, 256]], [1.0, 16.0]),
    }
    return CostModel("ms", 5.0, 1.0, tuple(((g.name,), tables[g.kind]) for g in GROUPS))


def test_a_latency_budget_is_met_by_the_cost_model():
    model = linear_cost()
    config = PruneConfig(max_latency_ms=25.0)
    choice = choose_plan(GRAPH, AXES, GROUPS, RANKINGS, config, EDGE, model)
    dense, pruned = choice.latency_ms
    assert dense == pytest.approx(5 + 2 * 4 + 2 * 16)
    assert pruned == pytest.approx(model.total({g.name: len(g.kept) for g in choice.plan.groups})) and pruned <= 25.0
    # One more millisecond anywhere would not fit: what is left is less than a step.
    assert pruned > 24.0


def test_a_latency_below_the_smallest_model_names_the_smallest():
    with pytest.raises(ConfigError, match=r"budget of 8 milliseconds; got the smallest legal one has 9"):
        choose_plan(GRAPH, AXES, GROUPS, RANKINGS, PruneConfig(max_latency_ms=8.0), EDGE, linear_cost())
    with pytest.raises(ConfigError, match="there is no latency model"):
        choose(max_latency_ms=8.0)


def fisher():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for group in GROUPS:
        factor = torch.randn(group.size, group.size, generator=generator, dtype=torch.float64)
        found[group.name] = factor @ factor.T
    return found


def test_the_method_of_kwon_searches_and_rearranges_by_fisher_matrices():
    matrices = fisher()
    rankings = {n: Ranking.of_scores(m.diagonal()) for n, m in matrices.items()}
    choice = choose_plan(GRAPH, AXES, GROUPS, rankings, PruneConfig(sparsity=0.5), EDGE, fisher=matrices)
    macs = choice.macs()
    assert macs["prunable_pruned"] <= 0.5 * macs["prunable_dense"]
    for group in choice.plan.groups:
        searched = rankings[group.name].best(len(group.kept))
        loss = lambda kept, m=matrices[group.name]: removal_loss(kept, m)
        assert loss(group.kept) <= loss(searched)
        assert choice.lattice.allows(group.kind, len(group.kept), group.size)
    by_latency = choose_plan(
        GRAPH, AXES, GROUPS, rankings, PruneConfig(max_latency_ms=25.0), EDGE, linear_cost(), matrices
    )
    assert by_latency.latency_ms[1] <= 25.0
    with pytest.raises(ConfigError, match="uniform is not for method='fisher'"):
        choose_plan(GRAPH, AXES, GROUPS, rankings, PruneConfig(uniform=True), EDGE, fisher=matrices)
