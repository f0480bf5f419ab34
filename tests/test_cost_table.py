"""Rows of the cost table against whole runs of a graph whose weights were changed by hand; curves; the grid."""

import pytest
import torch
import transformers
from torch import nn

from checks import bert_graph, groups_of, mlp_graph, randomise, text_batch
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.cost_table import RIDGE, curves, grid, measure_rows, table_batches
from tilecut_passes.dense_layer import dense_layer
from tilecut_passes.layer_statistics import collect_statistics
from tilecut_passes.mask import Mask
from tilecut_passes.measure_divergence import measure_divergence
from tilecut_passes.plan import PrunePlan
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import Ranking, score

SILENT = lambda done, of: None
KINDS = ("heads", "kv_groups", "queries", "neurons")


def rows_of(graph, groups, wanted, batches, outputs=None, statistics=None):
    rankings = score("magnitude", graph, groups, [])
    if statistics is None:
        nodes = [s.node.name for g in groups for s in g.gates if dense_layer(s.node) is not None]
        statistics = collect_statistics(graph, nodes, batches, 0, False, SILENT)
    found = {}
    measure_rows(
        graph, groups, rankings, wanted, statistics, batches, outputs or graph.outputs,
        lambda name, size, loss: found.update({(name, size): loss}),
    )  # fmt: skip
    return found, rankings


def gqa_graph():
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return capture(randomise(transformers.LlamaForCausalLM(config)))


def ids(graph, count=3):
    made = []
    for i in range(count):
        one = text_batch(2, 9, seed=i, vocab=61)
        made.append({k: v for k, v in one.items() if k in graph.inputs})
    return check_batches(graph, made)


@pytest.mark.parametrize("make", [bert_graph, gqa_graph])
def test_without_refit_a_row_is_the_divergence_of_the_masked_model(make):
    graph = make()
    groups = groups_of(graph, *KINDS)
    batches = ids(graph)
    wanted = [(g.name, n) for g in groups for n in (1, g.size - 1)]
    found, rankings = rows_of(graph, groups, wanted, batches, statistics={})
    assert found.keys() == set(wanted)
    for name, size in wanted:
        plan = PrunePlan.keep_all(graph, groups).keeping({name: rankings[name].best(size)})
        masked = graph.copy()
        run_passes(masked, [Mask(plan)])
        losses = [measure_divergence(graph.run(b.inputs), masked.run(b.inputs), b) for b in batches]
        assert found[name, size] == pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=1e-9)


def test_a_row_is_measured_after_the_best_refit_of_what_reads_the_gate():
    graph = mlp_graph(neurons=10)
    (group,) = groups_of(graph)
    x = torch.randn(64, 12)
    batches = check_batches(graph, [{"x": part} for part in x.split(16)])
    found, rankings = rows_of(graph, [group], [(group.name, 6)], batches)
    kept = list(rankings[group.name].best(6))
    hidden = torch.relu(x @ graph.tensor("up.weight").T + graph.tensor("up.bias")).double().detach()
    design = torch.cat([hidden[:, kept], torch.ones(64, 1)], 1)
    target = graph.run({"x": x})["output"].double()
    start = torch.cat([graph.tensor("down.weight").T[kept], graph.tensor("down.bias")[None]]).double().detach()
    penalty = RIDGE * design[:, :-1].square().sum(0).mean()
    left = design.T @ design + torch.diag(torch.tensor([*[float(penalty)] * 6, 0.0]))
    solved = start + torch.linalg.solve(left, design.T @ (target - design @ start))
    expected = [
        float((a - b).square().sum() / a.square().sum()) / 2
        for a, b in zip(target.split(16), (design @ solved).split(16))
    ]
    assert found[group.name, 6] == pytest.approx(sum(expected) / 4, rel=1e-4)
    unrepaired, _ = rows_of(graph, [group], [(group.name, 6)], batches, statistics={})
    assert found[group.name, 6] < unrepaired[group.name, 6]


def test_measuring_leaves_the_graph_as_it_was():
    graph = bert_graph()
    groups = groups_of(graph)
    before = {name: tensor.clone() for name, tensor in graph.tensors.items()}
    code = str(graph.fx)
    rows_of(graph, groups, [(g.name, 1) for g in groups], ids(graph))
    assert str(graph.fx) == code
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.tensors.items())


class Shared(nn.Module):
    """One pair of layers, used twice, and a convolution: weights that no row refits."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.widen, self.narrow = nn.Conv1d(8, 10, 1), nn.Conv1d(10, 8, 1)

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return self.narrow(torch.relu(self.widen(x.transpose(1, 2)))).transpose(1, 2)


def test_shared_weights_and_convolutions_are_gated():
    graph = capture(randomise(Shared()), torch.randn(2, 5, 8))
    groups = groups_of(graph)
    assert sorted(g.size for g in groups) == [10, 12]
    batches = check_batches(graph, [{"x": torch.randn(3, 5, 8)}])
    found, rankings = rows_of(graph, groups, [(g.name, 4) for g in groups], batches)
    for group in groups:
        masked = graph.copy()
        kept = {group.name: rankings[group.name].best(4)}
        run_passes(masked, [Mask(PrunePlan.keep_all(graph, groups).keeping(kept))])
        expected = measure_divergence(graph.run(batches[0].inputs), masked.run(batches[0].inputs), batches[0])
        assert found[group.name, 4] == pytest.approx(expected, rel=1e-4)


def test_only_the_outputs_asked_for_count():
    graph = bert_graph()
    (group,) = groups_of(graph)[-1:]
    batches = ids(graph)
    both, _ = rows_of(graph, [group], [(group.name, 8)], batches)
    one, _ = rows_of(graph, [group], [(group.name, 8)], batches, outputs=["last_hidden_state"])
    other, _ = rows_of(graph, [group], [(group.name, 8)], batches, outputs=["pooler_output"])
    key = group.name, 8
    assert both[key] == pytest.approx(one[key] + other[key], rel=1e-5) and one[key] > 0


def test_curves_pass_through_the_rows_and_never_rise():
    graph = mlp_graph(neurons=20)
    (group,) = groups_of(graph)
    ranking = Ranking.of_scores(torch.arange(1.0, 21.0))
    rows = {(group.name, 4): 2.0, (group.name, 12): 0.5, (group.name, 16): 0.6}
    curve = curves([group], {group.name: ranking}, rows)[group.name]
    assert curve.order == ranking.order
    assert curve.losses[20] == 0.0
    assert list(curve.losses) == sorted(curve.losses, reverse=True)
    assert curve.losses[4] == pytest.approx(2.0)
    # 12 units cannot lose less than 16: noise of the measurement.
    assert curve.losses[12] == pytest.approx(0.6) == curve.losses[16]
    assert curve.losses[0] > curve.losses[4]


def test_between_rows_a_curve_follows_the_importance_or_a_line_where_that_sees_no_loss():
    graph = mlp_graph(neurons=20)
    (group,) = groups_of(graph)
    scores = torch.arange(1.0, 21.0)
    ranking = Ranking.of_scores(scores)
    double = {(group.name, n): 2 * ranking.losses[n] for n in (2, 10, 18)}
    curve = curves([group], {group.name: ranking}, double)[group.name]
    assert curve.losses == pytest.approx([2 * loss for loss in ranking.losses])
    free = Ranking(tuple(range(20)), tuple([0.0] * 21))
    curve = curves([group], {group.name: free}, {(group.name, 10): 1.0})[group.name]
    assert curve.losses[15] == pytest.approx(0.5)


def test_a_group_without_rows_keeps_its_own_curve():
    graph = mlp_graph()
    (group,) = groups_of(graph)
    ranking = Ranking.of_scores(torch.rand(20))
    assert curves([group], {group.name: ranking}, {})[group.name] is ranking


@pytest.mark.parametrize("count", [1, 2, 13, 14, 96, 1000])
def test_the_grid_holds_the_ends_and_not_the_dense_size(count):
    sizes = [16 * (i + 1) for i in range(count)]
    chosen = grid(sizes)
    assert len(chosen) == min(count - 1, 13) or count == 14
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(sizes[:-1])
    if count > 1:
        assert chosen[0] == sizes[0] and chosen[-1] == sizes[-2]


def test_batches_are_spread_and_labelled_ones_preferred():
    graph = bert_graph()
    rows = [Batch({"input_ids": torch.zeros(50, 40, dtype=torch.long)}) for _ in range(10)]
    assert rows[0].positions == 2000
    assert table_batches(graph, rows, graph.outputs) == [rows[i] for i in (1, 5, 8)]
    labelled = [Batch(rows[0].inputs, torch.zeros(50, dtype=torch.long))]
    assert table_batches(graph, rows + labelled, graph.outputs) == labelled
