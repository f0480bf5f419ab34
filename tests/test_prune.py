"""The project's central test: the masked dense model and the cut model are the same function."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import bert_graph, groups_of, minilm_graph, mlp_graph, random_plan, text_batch, tiny_bert
from tilecut_passes.capture import capture
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import PlanError


def cut_and_masked(graph, plan):
    cut, masked = graph.copy(), graph.copy()
    run_passes(cut, [Prune(plan)])
    run_passes(masked, [Mask(plan)])
    return cut, masked


def swapped(plan: PrunePlan, name: str) -> PrunePlan:
    """The plan with one kept unit of a group replaced by one that it drops."""
    (group,) = [g for g in plan.groups if g.name == name]
    dropped = next(u for u in range(group.size) if u not in group.kept)
    return plan.keeping({name: sorted([*group.kept[1:], dropped])})


@settings(max_examples=10)
@given(
    heads=st.integers(1, 6), width=st.sampled_from([2, 4, 6]), neurons=st.integers(2, 40), layers=st.sampled_from([1, 1, 1, 2]),
    attn=st.sampled_from(["sdpa", "eager"]), with_mask=st.booleans(), batch=st.integers(1, 4), length=st.integers(1, 19),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_masked_equals_cut_on_random_berts(heads, width, neurons, layers, attn, with_mask, batch, length, seed):
    model = tiny_bert(layers, heads, width, neurons, attn=attn, seed=seed)
    graph = capture(model, None if with_mask else {"input_ids": torch.zeros(2, 5, dtype=torch.long)})
    plan = random_plan(graph, seed)
    cut, masked = cut_and_masked(graph, plan)
    for shape in ((batch, length), (2, 7)):
        inputs = {name: text_batch(*shape, seed=seed)[name] for name in graph.inputs}
        assert largest_error(masked.run(inputs), cut.run(inputs)) <= 1e-5


def test_masked_equals_cut_on_the_real_model():
    graph = minilm_graph()
    cut, masked = cut_and_masked(graph, random_plan(graph, seed=1))
    for shape in ((3, 17), (2, 64)):
        inputs = text_batch(*shape, vocab=30522)
        assert largest_error(masked.run(inputs), cut.run(inputs)) <= 1e-5


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_a_swapped_unit_is_caught(kind):
    graph = bert_graph()
    plan = random_plan(graph, 3).keeping({g.name: range(g.size // 2) for g in groups_of(graph)})
    cut, _ = cut_and_masked(graph, plan)
    name = next(g.name for g in plan.groups if g.kind == kind)
    _, masked = cut_and_masked(graph, swapped(plan, name))
    inputs = text_batch(3, 9)
    assert largest_error(masked.run(inputs), cut.run(inputs)) > 1e-4


def test_cutting_shrinks_the_parameters_under_their_own_names():
    graph = bert_graph().copy()
    plan = PrunePlan.keep_all(graph, groups_of(graph)).keeping(
        {"encoder.layer.0.attention:heads": [1, 3], "encoder.layer.1:neurons": [5, 7, 11]}
    )
    dense = {k: v.clone() for k, v in graph.tensors.items()}
    run_passes(graph, [Prune(plan)])
    now = graph.tensors
    assert list(now) == list(dense)
    query = dense["encoder.layer.0.attention.self.query.weight"].view(4, 8, 32)
    assert torch.equal(now["encoder.layer.0.attention.self.query.weight"], query[[1, 3]].flatten(0, 1))
    assert torch.equal(
        now["encoder.layer.1.output.dense.weight"], dense["encoder.layer.1.output.dense.weight"][:, [5, 7, 11]]
    )


def test_the_callers_model_is_not_changed():
    model = tiny_bert()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = capture(model)
    run_passes(graph, [Prune(random_plan(graph, 5))])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_units_may_be_reordered_by_a_plan():
    graph = mlp_graph()
    (group,) = groups_of(graph)
    plan = PrunePlan.keep_all(graph, [group]).keeping({group.name: [7, 2, 5]})
    cut, masked = cut_and_masked(graph, plan)
    x = {"x": torch.randn(6, 12)}
    assert largest_error(masked.run(x), cut.run(x)) < 1e-5
    assert torch.equal(cut.tensor("up.bias"), graph.tensor("up.bias")[[7, 2, 5]])


def test_symbolic_shapes_survive_the_cut():
    graph = bert_graph().copy()
    before = graph.output_specs()
    run_passes(graph, [Prune(random_plan(graph, 9))])
    assert graph.output_specs() == before


def test_a_plan_of_the_dense_model_does_not_apply_to_the_cut_one():
    graph = mlp_graph()
    (group,) = groups_of(graph)
    plan = PrunePlan.keep_all(graph, [group]).keeping({group.name: range(4)})
    run_passes(graph, [Prune(plan)])
    with pytest.raises(PlanError, match="is another one"):
        Prune(plan)(graph)
