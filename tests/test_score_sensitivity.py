"""Output sensitivity against masked runs, one unit at a time; blocks; and which rows are run."""

import pytest
import torch

from checks import bert_graph, groups_of, mlp_graph, text_batch
from score_models import batches_of, scored
from tilecut_passes import score_sensitivity
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.mask import Mask
from tilecut_passes.measure_divergence import measure_divergence
from tilecut_passes.plan import PrunePlan
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import Ranking, score
from tilecut_passes.score_sensitivity import pick_rows


def divergence_without(graph, groups, group, units, batches):
    """The mean divergence of the graph that a plan masks."""
    masked = graph.copy()
    kept = [u for u in range(group.size) if u not in units]
    run_passes(masked, [Mask(PrunePlan.keep_all(graph, groups).keeping({group.name: kept}))])
    moved = [measure_divergence(graph.run(b.inputs), masked.run(b.inputs), b) for b in batches]
    return abs(sum(moved)) / len(moved)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(("model", "kind"), [("bert", "heads"), ("llama", "kv_groups"), ("mlp", "neurons")])
def test_every_unit_costs_what_its_mask_does(model, kind, labels):
    graph, groups = scored(model)
    batches = batches_of(model, graph, count=2, labels=labels)
    group = next(g for g in groups if g.kind == kind)
    costs = [divergence_without(graph, groups, group, [u], batches) for u in range(group.size)]
    want = Ranking.of_scores(torch.tensor(costs, dtype=torch.float64))
    got = score("sensitivity", graph, groups, batches)[group.name]
    assert got.order == want.order
    assert got.losses == pytest.approx(want.losses, rel=1e-3, abs=1e-6 * want.losses[0])


def test_a_large_group_is_run_in_blocks_of_like_units(monkeypatch):
    monkeypatch.setattr(score_sensitivity, "RUNS", 6)
    graph = mlp_graph(neurons=20)
    (group,) = groups_of(graph)
    batches = batches_of("mlp", graph, count=2, labels=False)
    hidden = torch.cat([b.inputs["x"] for b in batches]) @ graph.tensor("up.weight").T + graph.tensor("up.bias")
    prior = torch.relu(hidden).norm(dim=0) * graph.tensor("down.weight").abs().sum(0)
    want = torch.zeros(20, dtype=torch.float64)
    for block in prior.argsort().tensor_split(6):
        cost = divergence_without(graph, [group], group, block.tolist(), batches)
        part = prior[block].detach().double().square()
        want[block] = cost * part / part.sum()
    seen = []
    got = score("sensitivity", graph, [group], batches, progress=lambda *at: seen.append(at))[group.name]
    assert got.losses == pytest.approx(Ranking.of_scores(want).losses, rel=1e-3)
    assert seen[-1] == (12, 12)


def test_a_block_whose_units_are_all_dead_costs_nothing(monkeypatch):
    monkeypatch.setattr(score_sensitivity, "RUNS", 5)
    graph = mlp_graph(neurons=20).copy()
    down = graph.tensor("down.weight").detach().clone()
    down[:, [0, 3, 4, 8, 15]] = 0
    graph.set_tensor("down.weight", torch.nn.Parameter(down))
    (group,) = groups_of(graph)
    ranking = score("sensitivity", graph, [group], batches_of("mlp", graph, labels=False))[group.name]
    assert set(ranking.order[:5]) == {0, 3, 4, 8, 15}
    assert ranking.losses[15] == 0 < ranking.losses[14]


def test_a_bounded_number_of_rows_is_run():
    graph = bert_graph()
    batches = check_batches(graph, [text_batch(20, 9, seed=i) for i in range(9)])
    picked = pick_rows(graph, batches)
    assert len(picked) == score_sensitivity.BATCHES
    for batch in picked:
        assert {len(v) for v in batch.inputs.values()} == {score_sensitivity.ROWS}
    assert torch.equal(picked[0].inputs["input_ids"], batches[0].inputs["input_ids"][: score_sensitivity.ROWS])
    few = check_batches(graph, [text_batch(2, 9)])
    assert len(pick_rows(graph, few)) == 1
    assert pick_rows(graph, few)[0].inputs["input_ids"].shape == (2, 9)


def test_labels_are_cut_with_the_rows():
    graph = bert_graph()
    picked = pick_rows(graph, batches_of("bert", graph, rows=20))
    assert all(b.labels is not None and b.labels.shape == (score_sensitivity.ROWS, 9) for b in picked)


def test_rows_that_are_no_rows_of_all_inputs_are_kept():
    """An input without the batch dimension cannot be cut with the others."""
    graph = mlp_graph().copy()
    graph.dims = {}
    batch = Batch({"x": torch.randn(30, 12)})
    graph.placeholders[0].meta["val"] = graph.fake_mode().from_tensor(torch.empty(30, 12), static_shapes=True)
    assert pick_rows(graph, [batch]) == [batch]
