"""Head widths, the hidden width and whole branches: masked equals cut, and the search trades them with everything else."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from checks import bert_graph, text_batch, tiny_bert
from test_models import made, outputs, with_another_unit
from tilecut import PruneConfig, compile_pruned
from tilecut.choose_plan import choose_plan
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_passes.count_macs import MacCounter, ParameterCounter, count_parameters
from tilecut_passes.graph import Graph
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.project_outputs import DropProjections, ProjectOutputs, without_projections
from tilecut_passes.prune import Prune
from tilecut_passes.reconstruct import Reconstruct
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_passes.score import Ranking, score
from tilecut_runtime.errors import ConfigError, PlanError
from tilecut_targets.find_target import find_target

ARCHITECTURES = {
    "qk_width": ("bert", "gpt2", "llama_gqa", "gptj", "t5", "vit", "qwen3", "phi3"),
    "vo_width": ("bert", "gpt2", "llama_gqa", "gptj", "t5", "vit", "swin"),
    "hidden": ("bert_eager", "gpt2", "llama_tied", "vit", "gemma2", "t5", "whisper", "swin", "bloom", "wav2vec2", "mixtral"),
    "layers": ("bert", "gpt2", "llama_gqa", "gptj", "albert", "t5", "vit", "falcon_gqa", "qwen2_moe"),
}
ALL = ("heads", "kv_groups", "queries", "neurons", *ARCHITECTURES)
EDGE = find_target("edge")


def plan_of(graph: Graph, kinds: tuple[str, ...], seed: int) -> PrunePlan:
    """A plan that keeps another part of every group; of branches one is removed at least."""
    rng = random.Random(seed)
    groups = [g for g in find_groups(infer(graph)) if g.kind in kinds]
    kept = {g.name: sorted(rng.sample(range(g.size), rng.randint(1, max(g.size - 1, 1)))) for g in groups}
    branches = [g.name for g in groups if g.kind == "layers"]
    kept |= {name: [] for i, name in enumerate(branches) if i % 2 == 0}
    return PrunePlan.keep_all(graph, groups).keeping(kept)


def captured(name: str) -> Graph:
    graph = capture(*made(name))
    run_passes(graph, [ProjectOutputs()])
    return graph


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in ARCHITECTURES.items() for name in names])
def test_masked_is_cut(kind, name):
    graph = captured(name)
    plan = plan_of(graph, (kind,), seed=3)
    want = outputs(graph, Mask(plan))
    dense = outputs(graph, Mask(PrunePlan.keep_all(graph, [])))
    for a, b, whole in zip(want, outputs(graph, Prune(plan)), dense, strict=True):
        assert largest_error(a, b) <= 1e-5
        assert largest_error(a, whole) > 1e-4
    if kind != "layers":
        swapped = outputs(graph, Prune(with_another_unit(plan)))
        assert max(largest_error(a, b) for a, b in zip(want, swapped, strict=True)) > 1e-4


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gptj", "t5", "vit"])
def test_all_kinds_at_once(name):
    graph = captured(name)
    plan = plan_of(graph, ALL, seed=5)
    for a, b in zip(outputs(graph, Mask(plan)), outputs(graph, Prune(plan)), strict=True):
        assert largest_error(a, b) <= 1e-4


def test_projections_are_identities_and_go_again():
    graph = capture(tiny_bert())
    inputs = text_batch(2, 9)
    before = graph.run(inputs)
    nodes = len(list(graph.nodes))
    assert run_passes(graph, [ProjectOutputs(), ProjectOutputs()])[1].rewrites == 0
    assert len(list(graph.nodes)) > nodes
    assert largest_error(before, graph.run(inputs)) == 0
    assert len(list(without_projections(graph).nodes)) == nodes
    assert run_passes(graph, [DropProjections()])[0].rewrites == 1
    assert len(list(graph.nodes)) == nodes


def test_a_plan_of_the_hidden_width_applies_to_a_fresh_capture(tmp_path):
    model = tiny_bert()
    graph = capture(model)
    run_passes(graph, [ProjectOutputs()])
    plan = plan_of(graph, ("hidden", "layers", "neurons"), seed=1)
    plan.write(tmp_path / "plan.json")
    read = PrunePlan.read(tmp_path / "plan.json")
    assert read.groups == plan.groups
    fresh = capture(model)
    cut, again = graph.copy(), fresh.copy()
    run_passes(cut, [Prune(plan)])
    run_passes(again, [Prune(read)])
    inputs = text_batch(2, 9)
    assert largest_error(cut.run(inputs), again.run(inputs)) == 0


def test_macs_and_parameters_of_the_cut_graph_are_what_was_counted():
    graph = captured("bert")
    axes = infer(graph)
    groups = find_groups(axes)
    counter = MacCounter(axes, groups, {"batch": 2, "sequence": 16})
    for seed in range(4):
        plan = plan_of(graph, ALL, seed)
        cut = graph.copy()
        run_passes(cut, [Prune(plan)])
        counts = {g.name: g.count for g in plan.groups}
        after = infer(cut)
        assert counter.total(counts) == MacCounter(after, find_groups(after), {"batch": 2, "sequence": 16}).total()
        assert ParameterCounter(axes, counter).total(counts) == count_parameters(cut)
    plain = capture(*made("bert"))
    whole = infer(plain)
    assert counter.total() == MacCounter(whole, find_groups(whole), {"batch": 2, "sequence": 16}).total()
    assert ParameterCounter(axes, counter).total() == count_parameters(plain)


def curves_of(groups, rng):
    """Losses that rise as units go, at random."""
    rankings = {}
    for g in groups:
        steps = sorted((rng.random() for _ in range(g.size)), reverse=True)
        losses = list(itertools.accumulate(reversed(steps), initial=0.0))[::-1]
        rankings[g.name] = Ranking(tuple(range(g.size)), tuple(losses))
    return rankings


@pytest.mark.parametrize("seed", range(3))
def test_the_search_over_all_kinds_is_the_best_of_all_plans(seed):
    graph = capture(tiny_bert(layers=1, heads=2, width=16, neurons=32))
    run_passes(graph, [ProjectOutputs()])
    axes = infer(graph)
    groups = [g for g in find_groups(axes) if g.kind in ALL]
    rankings = curves_of(groups, random.Random(seed))
    config = PruneConfig(sparsity=0.55, kinds=ALL)
    choice = choose_plan(graph, axes, groups, rankings, config, EDGE)
    counter = MacCounter(axes, find_groups(axes), config.sizes())
    within = counter.within(groups)
    assert {len(inner) for inner in within.values()} == {1, 3}
    legal = {g.name: [g.size] for g in groups} | {
        g.name: {"layers": [0, 1], "heads": [1, 2], "neurons": [16, 32], "hidden": [16, 32]}.get(g.kind, [8, 16])
        for g in groups
    }
    budget = 0.45 * counter.of_groups([g.name for g in groups])
    best = float("inf")
    for sizes in itertools.product(*legal.values()):
        one = dict(zip(legal, sizes))
        gone = {n for layer, inner in within.items() if one[layer] == 0 for n in inner}
        if counter.of_groups(list(one), one) <= budget:
            best = min(best, sum(rankings[n].losses[k] for n, k in one.items() if n not in gone))
    assert choice.loss == pytest.approx(best, rel=2e-3)
    assert choice.macs()["prunable_pruned"] <= budget
    kinds = choice.by_kind()
    assert set(kinds) == {"hidden", "qk_width", "vo_width", "heads", "neurons", "layers"}


def test_the_stream_behind_a_removed_branch_is_refitted():
    graph = capture(tiny_bert(layers=3))
    groups = [g for g in find_groups(infer(graph)) if g.kind == "layers"]
    plan = PrunePlan.keep_all(graph, groups).keeping({groups[1].name: []})
    cut = graph.copy()
    run_passes(cut, [Prune(plan)])
    batches = [text_batch(16, 24, seed=i) for i in range(8)]
    held_out = text_batch(8, 20, seed=100)
    want, before = graph.run(held_out), cut.run(held_out)
    assert run_passes(cut, [Reconstruct(graph, [Batch(b) for b in batches], plan)])[0].rewrites > 4
    assert largest_error(want, cut.run(held_out)) < 0.7 * largest_error(want, before)


@pytest.mark.parametrize("gone", ["0.self_attn", "0.mlp", "1.self_attn"])
def test_what_is_behind_a_removed_branch_is_refitted_to_the_dense_stream(gone):
    """The residual of a layer is another node in the dense graph, where a branch between the two was removed."""
    model = made("llama_gqa")[0]
    graph = capture(model)
    ids = [torch.randint(0, 99, (8, 16), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    given = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    groups = [g for g in find_groups(infer(graph)) if g.kind == "layers"]
    plan = PrunePlan.keep_all(graph, groups).keeping({f"model.layers.{gone}:layers": []})
    cut = graph.copy()
    run_passes(cut, [Prune(plan)])
    errors = [largest_error(graph.run(given[0]), cut.run(given[0]))]
    run_passes(cut, [Reconstruct(graph, [Batch(one) for one in given], plan)])
    errors.append(largest_error(graph.run(given[0]), cut.run(given[0])))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("bert", ALL),
        ("gpt2", ("layers", "qk_width")),
        ("llama_gqa", ALL),
        ("llama_tied", ("hidden",)),
        ("vit", ("layers", "hidden")),
    ],
)
def test_an_artifact_of_every_kind(name, kinds, tmp_path):
    model, example = made(name)
    budget = int(0.6 * count_parameters(capture(model, example)))
    config = PruneConfig(max_params=budget, kinds=kinds, method="magnitude")
    artifact = compile_pruned(model, "edge", example, None, config, tmp_path / "out", measure=False)
    report = artifact.report
    assert report["parameters"]["pruned"] <= budget
    rungs = {r["name"]: r for r in report["verification"]}
    assert rungs["artifact equals pruned model"]["status"] == rungs["cut equals masked dense"]["status"] == "passed"
    assert any(kind["kept"] < kind["units"] for kind in report["kinds"].values())


@pytest.mark.parametrize("importance", ["obs", "fisher", "magnitude", "wanda", "flap", "sensitivity", "attention"])
def test_importances_rank_every_kind(importance):
    graph = bert_graph().copy()
    run_passes(graph, [ProjectOutputs()])
    groups = [g for g in find_groups(infer(graph)) if g.kind in ALL]
    rankings = score(importance, graph, groups, [Batch(text_batch(4, 9, seed=i)) for i in range(2)])
    for g in groups:
        assert sorted(rankings[g.name].order) == list(range(g.size))
        assert all(a >= b >= 0 for a, b in itertools.pairwise(rankings[g.name].losses))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"kinds": ("hidden",), "min_units": {"hidden": 17}, "max_units": {"hidden": 31}}, "has no legal size from 17 to 31"),
        ({"kinds": ("hidden",), "sparsity": 0.9}, "no legal model fits the budget"),
        ({"kinds": ("qk_width",), "max_units": {"qk_width": 7}}, "has no legal size"),
    ],
)
def test_impossible_wishes(config, match):
    with pytest.raises(ConfigError, match=match):
        compile_pruned(tiny_bert(), config=PruneConfig(method="magnitude", **config), output="never", measure=False)


def test_what_knows_no_other_kind_says_so():
    with pytest.raises(ConfigError, match="knows no hidden"):
        PruneConfig(method="fisher", kinds=("hidden",))
    graph = bert_graph()
    groups = [g for g in find_groups(infer(graph)) if g.kind == "neurons"]
    with pytest.raises(PlanError, match="keeps nothing"):
        PrunePlan.keep_all(graph, groups).keeping({groups[0].name: []})


def test_padded_head_widths_are_chosen_without_padding():
    graph = bert_graph(heads=2, width=32, neurons=128)
    axes = infer(graph)
    groups = [g for g in find_groups(axes) if g.kind in ("qk_width", "vo_width")]
    rankings = score("magnitude", graph, groups, [])
    config = PruneConfig(sparsity=0.4, kinds=("qk_width", "vo_width"))
    choice = choose_plan(graph, axes, groups, rankings, config, find_target("ascend"))
    widths = [g for g in choice.plan.groups if g.kind in ("qk_width", "vo_width")]
    assert 16 in {g.count for g in widths} <= {16, 32}
    assert all(g.padded_to is None for g in widths)
    pruned = graph.copy()
    run_passes(pruned, [Prune(choice.plan)])
    assert [enforce(pruned) for enforce in find_target("ascend").enforce()] == [0] * len(find_target("ascend").enforce())
    assert torch.isfinite(pruned.run(text_batch(2, 9))["last_hidden_state"]).all()
