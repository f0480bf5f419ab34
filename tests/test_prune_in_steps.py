"""Cutting in steps: two cuts are one, repair and recovery see each, and a floor ends it."""

import random

import pytest
import torch
import transformers

from checks import bert_graph, groups_of, mlp_graph, random_plan, randomise, text_batch
from tilecut.make_cases import make_inputs
from tilecut.prune_in_steps import prune_in_steps, relative_plan
from tilecut_passes.calibration import check_batches
from tilecut_passes.capture import capture
from tilecut_passes.enforce_block_multiple import EnforceBlockMultiple
from tilecut_passes.enforce_power_of_two_heads import EnforcePowerOfTwoHeads
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.reconstruct import Reconstruct
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import PlanError, RecoveryError

KINDS = ("heads", "kv_groups", "queries", "neurons")


def llama():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=64,
    )  # fmt: skip
    return capture(randomise(transformers.LlamaForCausalLM(config)))


GRAPHS = {"bert": bert_graph, "llama": llama}


@pytest.fixture(scope="module", params=GRAPHS)
def dense(request):
    return GRAPHS[request.param]()


def nested(dense, seed, count=2):
    """Plans that each keep a random part of what the one before kept; some keep one unit of a group."""
    rng = random.Random(seed)
    plan = PrunePlan.keep_all(dense, groups_of(dense, *KINDS))
    plans = []
    for _ in range(count):
        plan = plan.keeping({g.name: sorted(rng.sample(g.kept, rng.randint(1, len(g.kept)))) for g in plan.groups})
        plans.append(plan)
    return plans


def cut(graph, *plans):
    made = graph.copy()
    run_passes(made, [Prune(plan) for plan in plans])
    return made


def cut_again(graph, earlier, later):
    run_passes(graph, [Prune(relative_plan(earlier, later, graph))])
    return graph


@pytest.mark.parametrize("seed", range(4))
def test_two_cuts_are_one(dense, seed):
    first, second = nested(dense, seed)
    once, twice = cut(dense, second), cut_again(cut(dense, first), first, second)
    for name, tensor in once.tensors.items():
        assert torch.equal(tensor, twice.tensor(name)), name
    inputs = make_inputs(dense, 2, 9, seed=1)
    assert largest_error(once.run(inputs), twice.run(inputs)) == 0


def test_where_one_kv_group_stays_its_queries_can_still_go():
    dense = llama()
    plan = PrunePlan.keep_all(dense, groups_of(dense, *KINDS))
    first = plan.keeping({g.name: [1] for g in plan.groups if g.kind == "kv_groups"})
    second = first.keeping({g.name: [1] for g in plan.groups if g.kind == "queries"})
    twice = cut_again(cut(dense, first), first, second)
    assert all(torch.equal(t, twice.tensor(name)) for name, t in cut(dense, second).tensors.items())


def test_padding_comes_with_the_plan_that_asks_for_it():
    dense = bert_graph()
    plan = PrunePlan.keep_all(dense, groups_of(dense))
    first = plan.keeping({g.name: range(3 if g.kind == "heads" else 30) for g in plan.groups})
    second = plan.keeping({g.name: range(3 if g.kind == "heads" else 10) for g in plan.groups})
    legal = [EnforcePowerOfTwoHeads(), EnforceBlockMultiple(block=16)]
    for enforce in legal:
        first, second = enforce.on_plan(first, dense), enforce.on_plan(second, dense)
    assert {g.count for g in second.groups} == {4, 16}
    once, twice = cut(dense, second), cut_again(cut(dense, first), first, second)
    assert all(torch.equal(t, twice.tensor(name)) for name, t in once.tensors.items())


def test_order_is_the_later_plans():
    dense = mlp_graph()
    (group,) = groups_of(dense)
    plan = PrunePlan.keep_all(dense, [group])
    first, second = plan.keeping({group.name: [9, 3, 7, 1]}), plan.keeping({group.name: [1, 9]})
    twice = cut_again(cut(dense, first), first, second)
    assert torch.equal(twice.tensor("up.weight"), dense.tensor("up.weight")[[1, 9]])


def test_plans_that_are_not_nested():
    dense = mlp_graph()
    (group,) = groups_of(dense)
    plan = PrunePlan.keep_all(dense, [group])
    first, second = plan.keeping({group.name: range(10)}), plan.keeping({group.name: [3, 12]})
    with pytest.raises(PlanError, match=f"{group.name} keeps a unit that was cut before; got 12"):
        relative_plan(first, second, cut(dense, first))
    with pytest.raises(PlanError, match="for different groups"):
        relative_plan(random_plan(bert_graph(), 1), second, dense)
    with pytest.raises(PlanError, match="the cut graph has no group like"):
        relative_plan(first, plan.keeping({group.name: [3]}), cut(dense, second))


def test_a_graph_that_was_cut_twice_is_refitted_to_the_dense_one():
    dense = bert_graph()
    groups = groups_of(dense)
    plan = PrunePlan.keep_all(dense, groups)
    plans = [plan.keeping({g.name: range(g.size * share // 4) for g in groups}) for share in (3, 2)]
    batches = check_batches(dense, [text_batch(8, 12, seed=i) for i in range(6)])
    seen, solved = [], []

    def repair(graph, plan):
        solved.append(run_passes(graph, [Reconstruct(dense, batches, plan)])[0].rewrites)
        seen.append({g.name: len(g.kept) for g in plan.groups})

    steps = prune_in_steps(dense, plans, repair, lambda graph, plan: None, lambda graph, plan: 1.0)
    assert seen == [{g.name: g.size * share // 4 for g in groups} for share in (3, 2)]
    assert steps.plan == plans[1] and steps.reached == 1 and not steps.notes
    bare = cut(dense, plans[1])
    # Every layer behind the first cut, as after one cut.
    assert solved == 2 * [run_passes(bare.copy(), [Reconstruct(dense, batches, plans[1])])[0].rewrites]
    assert solved[0] > 4
    inputs = text_batch(8, 12, seed=9)
    keep = inputs["attention_mask"] != 0
    want = dense.run(inputs)["last_hidden_state"][keep]
    refitted, sliced = (g.run(inputs)["last_hidden_state"][keep] for g in (steps.graph, bare))
    assert (refitted - want).norm() < 0.8 * (sliced - want).norm()


def count(graph, plan):
    return len(graph.tensor("up.bias")) / 20


@pytest.mark.parametrize(("floor", "reached", "tried"), [(None, 3, 4), (0.2, 3, 4), (0.5, 1, 3)])
def test_it_stops_under_the_floor(floor, reached, tried):
    dense = mlp_graph()
    (group,) = groups_of(dense)
    plan = PrunePlan.keep_all(dense, [group])
    plans = [plan.keeping({group.name: range(k)}) for k in (16, 12, 8, 4)]
    calls = []
    steps = prune_in_steps(
        dense, plans, lambda g, p: calls.append("repair"), lambda g, p: calls.append("recover"), count, floor
    )
    assert (steps.reached, len(steps.qualities), steps.plan) == (reached, tried, plans[reached])
    assert len(steps.graph.tensor("up.bias")) == len(plans[reached].groups[0].kept)
    assert calls == ["repair", "recover"] * tried
    assert len(dense.tensor("up.bias")) == 20
    if reached < 3:
        assert "stopped after step 2 of 4: the next one gives 0.4000, under the floor of 0.5" in steps.notes[0]


def test_a_floor_that_no_cut_holds():
    dense = mlp_graph()
    (group,) = groups_of(dense)
    plans = [PrunePlan.keep_all(dense, [group]).keeping({group.name: range(k)}) for k in (10, 5)]
    nothing = lambda graph, plan: None
    with pytest.raises(RecoveryError, match="the first cut falls under the floor; got 0.5000; wanted at least 0.9"):
        prune_in_steps(dense, plans, nothing, nothing, count, floor=0.9)
    with pytest.raises(RecoveryError, match="got nan"):
        prune_in_steps(dense, plans, nothing, nothing, lambda graph, plan: float("nan"), floor=0.9)
    with pytest.raises(PlanError, match="no plans"):
        prune_in_steps(dense, [], nothing, nothing, count)
