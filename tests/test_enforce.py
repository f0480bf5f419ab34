"""The enforce passes: 5 -> 4 and 5 -> 8 heads, widths 1500 -> 1536 and 1472, head widths to a multiple; exact or said."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import bert_graph, groups_of, in_double, mlp_graph, randomise, text_batch, tiny_bert
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.enforce_block_multiple import EnforceBlockMultiple
from tilecut_passes.enforce_head_width import EnforceHeadWidth
from tilecut_passes.enforce_power_of_two_heads import EnforcePowerOfTwoHeads
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_passes.score import score
from tilecut_runtime.errors import ConfigError


def sizes(graph, kind):
    return [g.size for g in find_groups(infer(graph)) if g.kind == kind]


def legalized(graph, one):
    legal = graph.copy()
    run_passes(legal, [one])
    assert one(legal) == 0, "a second run must rewrite nothing"
    return legal


@pytest.mark.parametrize(
    ("one", "kind", "before", "after"),
    [
        (EnforcePowerOfTwoHeads(how="pad"), "heads", [5, 5], [8, 8]),
        (EnforcePowerOfTwoHeads(how="cut"), "heads", [5, 5], [4, 4]),
        (EnforceBlockMultiple(how="pad", block=64), "neurons", [1500, 1500], [1536, 1536]),
        (EnforceBlockMultiple(how="cut", block=64), "neurons", [1500, 1500], [1472, 1472]),
        (EnforceHeadWidth(how="pad", multiple=8), "vo_width", [6, 6], [8, 8]),
        (EnforceHeadWidth(how="pad", multiple=8), "qk_width", [6, 6], [8, 8]),
        (EnforceHeadWidth(how="cut", multiple=4), "vo_width", [6, 6], [4, 4]),
    ],
)
def test_sizes_become_legal(one, kind, before, after):
    graph = bert_graph(heads=5, width=6, neurons=1500)
    assert sizes(graph, kind) == before
    assert sizes(legalized(graph, one), kind) == after


@pytest.mark.parametrize(
    "one",
    [
        EnforcePowerOfTwoHeads(),
        EnforceBlockMultiple(block=64),
        EnforceHeadWidth(multiple=8),
        EnforceHeadWidth(multiple=16),
    ],
)
def test_padding_changes_no_number(one):
    graph = in_double(bert_graph(heads=5, width=6, neurons=1500))
    legal = legalized(graph, one)
    for shape in ((3, 9), (1, 1)):
        assert largest_error(graph.run(text_batch(*shape)), legal.run(text_batch(*shape))) < 1e-13


@pytest.mark.parametrize(
    ("one", "kind", "count"),
    [(EnforcePowerOfTwoHeads(how="cut"), "heads", 4), (EnforceBlockMultiple(how="cut", block=64), "neurons", 1472)],
)
def test_cutting_equals_masking_the_units_of_least_magnitude(one, kind, count):
    graph = bert_graph(heads=5, width=6, neurons=1500)
    groups = groups_of(graph, kind)
    rankings = score("magnitude", graph, groups, [])
    plan = PrunePlan.keep_all(graph, groups).keeping({g.name: rankings[g.name].best(count) for g in groups})
    masked = graph.copy()
    run_passes(masked, [Mask(plan)])
    assert largest_error(masked.run(text_batch(3, 9)), legalized(graph, one).run(text_batch(3, 9))) < 1e-5


@settings(max_examples=25)
@given(neurons=st.integers(1, 70), block=st.integers(1, 32), seed=st.integers(0, 99))
def test_any_width_is_padded_exactly(neurons, block, seed):
    graph = mlp_graph(max(neurons, 2), seed)
    legal = legalized(graph, EnforceBlockMultiple(block=block))
    assert all(n % block == 0 for n in sizes(legal, "neurons"))
    x = {"x": torch.randn(5, 12)}
    assert largest_error(graph.run(x), legal.run(x)) < 1e-5


def test_a_plan_written_by_hand_is_padded_and_applied():
    graph = in_double(bert_graph(heads=5, width=6, neurons=1500))
    groups = groups_of(graph)
    by_hand = PrunePlan.keep_all(graph, groups).keeping(
        {g.name: range(3 if g.kind == "heads" else 100) for g in groups}
    )
    plan = by_hand
    for one in (EnforcePowerOfTwoHeads(), EnforceBlockMultiple(block=64), EnforceHeadWidth(multiple=8)):
        plan = one.on_plan(plan, graph)
        assert one.on_plan(plan, graph) == plan
    counts = {(g.kind, len(g.kept), g.padded_to) for g in plan.groups}
    assert counts == {("heads", 3, 4), ("neurons", 100, 128), ("qk_width", 6, 8), ("vo_width", 6, 8)}
    padded, plain = graph.copy(), graph.copy()
    run_passes(padded, [Prune(plan)])
    run_passes(plain, [Prune(by_hand)])
    assert sizes(padded, "heads") == [4, 4]
    assert sizes(padded, "neurons") == [128, 128]
    assert largest_error(plain.run(text_batch(3, 9)), padded.run(text_batch(3, 9))) < 1e-13


def test_a_plan_written_by_hand_is_cut_further():
    graph = bert_graph(heads=5, width=6, neurons=1500)
    groups = groups_of(graph, "neurons")
    plan = PrunePlan.keep_all(graph, groups).keeping({g.name: range(100) for g in groups})
    cut = EnforceBlockMultiple(how="cut", block=64).on_plan(plan, graph)
    assert [len(g.kept) for g in cut.groups] == [64, 64]
    assert all(set(g.kept) < set(range(100)) for g in cut.groups)


def test_wishes_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="unknown way to reach a legal size; got 'stretch'"):
        EnforceBlockMultiple(how="stretch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be positive"):
        EnforceBlockMultiple(block=0)
    with pytest.raises(ConfigError, match="must be positive"):
        EnforceHeadWidth(multiple=-8)


def test_the_softmax_scale_stays_the_dense_one():
    graph = capture(randomise(tiny_bert(heads=3, width=6)))
    legal = legalized(graph, EnforceHeadWidth(multiple=16))
    scales = [n.kwargs["scale"] for n in legal.nodes if "scaled_dot_product" in str(n.target)]
    assert scales == [pytest.approx(6**-0.5)] * 2
