"""Importances find what is planted, agree with exact values, and say what they need."""

import pytest
import torch
import transformers
from torch import nn

from checks import bert_graph, groups_of, mlp_graph, randomise, text_batch
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.mask import gate
from tilecut_passes.measure_loss import probe_loss, task_loss
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import IMPORTANCES, Ranking, score
from tilecut_runtime.errors import CalibrationError, ConfigError


def batches_for(graph, count=6, labels=False):
    made = [text_batch(4, 9, seed=i) for i in range(count)]
    if labels:
        for i, batch in enumerate(made):
            batch["labels"] = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(i))
    return check_batches(graph, made)


@pytest.mark.parametrize("method", list(IMPORTANCES))
def test_losses_grow_as_units_go(method):
    graph = bert_graph()
    for group in groups_of(graph):
        ranking = score(method, graph, [group], batches_for(graph, labels=True))[group.name]
        assert sorted(ranking.order) == list(range(group.size))
        assert ranking.losses[-1] == 0
        assert all(a >= b for a, b in zip(ranking.losses, ranking.losses[1:]))


def test_no_two_methods_rank_alike():
    graph = bert_graph()
    (group,) = [g for g in groups_of(graph) if g.name == "encoder.layer.0:neurons"]
    orders = [score(m, graph, [group], batches_for(graph, labels=True))[group.name].order for m in IMPORTANCES]
    assert len(set(orders)) == len(orders)


def test_the_surgeon_prices_a_removal_at_what_the_refit_leaves():
    """One linear output, so the model's outputs are the layer's: the cost is the least-squares residual, up to one factor."""
    graph = mlp_graph(neurons=10)
    (group,) = groups_of(graph)
    x = torch.randn(400, 12)
    batches = check_batches(graph, [{"x": part} for part in x.split(8)])
    ranking = score("obs", graph, [group], batches)[group.name]
    hidden = torch.relu(x @ graph.tensor("up.weight").T + graph.tensor("up.bias")).double()
    target = (hidden @ graph.tensor("down.weight").T.double() + graph.tensor("down.bias").double()).detach()
    residuals = []
    for gone in range(1, 6):
        kept = [u for u in range(10) if u not in ranking.order[:gone]]
        design = torch.cat([hidden[:, kept], torch.ones(400, 1)], 1).detach()
        solution = torch.linalg.lstsq(design, target).solution
        residuals.append(float((design @ solution - target).square().sum()))
    costs = torch.tensor([ranking.losses[10 - gone] for gone in range(1, 6)])
    ratios = costs / torch.tensor(residuals)
    assert ratios.max() / ratios.min() < 1.5


def test_the_surgeons_first_choice_is_the_best_single_removal():
    graph = mlp_graph(neurons=10, seed=3)
    (group,) = groups_of(graph)
    x = torch.randn(400, 12)
    ranking = score("obs", graph, [group], check_batches(graph, [{"x": part} for part in x.split(8)]))[group.name]
    hidden = torch.relu(x @ graph.tensor("up.weight").T + graph.tensor("up.bias")).double().detach()
    target = hidden @ graph.tensor("down.weight").T.double().detach()

    def residual(gone):
        design = torch.cat([hidden[:, [u for u in range(10) if u != gone]], torch.ones(400, 1)], 1)
        return float((design @ torch.linalg.lstsq(design, target).solution - target).square().sum())

    best = sorted(range(10), key=residual)
    assert ranking.order[0] in best[:2]


def test_a_duplicated_unit_costs_the_surgeon_nothing_but_fisher_much():
    graph = mlp_graph(neurons=10)
    for name in ("up.weight", "up.bias"):
        tensor = graph.tensor(name).detach().clone()
        tensor[4] = tensor[1]
        graph.set_tensor(name, torch.nn.Parameter(tensor))
    (group,) = groups_of(graph)
    batches = check_batches(graph, [{"x": torch.randn(8, 12)} for _ in range(40)])
    surgeon = score("obs", graph, [group], batches)[group.name]
    assert surgeon.order[0] in (1, 4)
    assert surgeon.losses[9] < 0.01 * surgeon.losses[8]
    fisher = score("fisher", graph, [group], batches)[group.name]
    assert fisher.losses[9] > 0.01 * fisher.losses[8]


def test_probes_estimate_the_gauss_newton_diagonal():
    """Mean squared gradient over many probes against the exact J^T J, in float64."""
    graph = mlp_graph(neurons=6)
    for name, tensor in graph.tensors.items():
        graph.set_tensor(name, torch.nn.Parameter(tensor.detach().double()))
    (group,) = groups_of(graph)
    gated = gate(graph, [group.name])
    batch = Batch({"x": torch.randn(3, 12, dtype=torch.float64)})

    def outputs(g):
        return gated.run(batch.inputs, {group.name: g})["output"].flatten()

    ones = torch.ones(6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(outputs, ones)
    exact = jacobian.square().sum(0) / outputs(ones).square().sum()
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(6, dtype=torch.float64)
    for _ in range(3000):
        g = ones.clone().requires_grad_()
        total += torch.autograd.grad(probe_loss(gated.run(batch.inputs, {group.name: g}), batch, generator), g)[
            0
        ].square()
    assert torch.allclose(total / 3000, exact, rtol=0.15)


def test_padding_does_not_count():
    graph = bert_graph()
    group = groups_of(graph)[1]
    short = text_batch(4, 6)
    padded = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in short.items()}
    labels = torch.randint(0, 32, (4, 6))
    labels[short["attention_mask"] == 0] = -100
    one = check_batches(graph, [{**short, "labels": labels}])
    two = check_batches(graph, [{**padded, "labels": torch.nn.functional.pad(labels, (0, 5), value=-100)}])
    a, b = (score("fisher", graph, [group], batches)[group.name].losses for batches in (one, two))
    assert a == pytest.approx(b, rel=1e-3)


def test_ties_keep_the_lower_index():
    ranking = Ranking.of_scores(torch.tensor([1.0, 1.0, 1.0, 0.5]))
    assert ranking.best(2) == (0, 1)
    assert ranking.losses == pytest.approx((3.5, 2.5, 1.5, 0.5, 0.0))


def test_what_is_missing_is_said():
    graph = bert_graph()
    groups = groups_of(graph)
    with pytest.raises(ConfigError, match="unknown method; got 'luck'"):
        score("luck", graph, groups, [])
    with pytest.raises(CalibrationError, match="needs calibration batches"):
        score("fisher", graph, groups, [])
    with pytest.raises(CalibrationError, match="'taylor' needs labels; got batches without labels"):
        score("taylor", graph, groups, batches_for(graph))


def test_nan_in_the_weights_is_named():
    graph = bert_graph().copy()
    weight = graph.tensor("encoder.layer.0.output.dense.weight").detach().clone()
    weight[0, 0] = float("nan")
    graph.set_tensor("encoder.layer.0.output.dense.weight", torch.nn.Parameter(weight))
    with pytest.raises(CalibrationError, match="not finite"):
        score("obs", graph, groups_of(graph), batches_for(graph))
    with pytest.raises(CalibrationError, match="not finite"):
        score("fisher", graph, groups_of(graph), batches_for(graph))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, dtype=torch.long), "they do not fit the output"),
        (torch.full((4, 9), 40), "outside the classes; got 40..40; wanted 0..31"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(CalibrationError, match=message):
        task_loss({"last_hidden_state": torch.randn(4, 9, 32)}, labels)


def test_a_pruned_graph_can_be_scored_again():
    graph = bert_graph().copy()
    groups = groups_of(graph)
    run_passes(graph, [Prune(PrunePlan.keep_all(graph, groups).keeping({g.name: range(g.size // 2) for g in groups}))])
    rankings = score("obs", graph, groups_of(graph), batches_for(graph))
    assert {len(r.order) for r in rankings.values()} == {2, 24}


def test_transposed_weights_are_scored_by_the_surgeon():
    model = randomise(transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)))
    graph = capture(model)
    groups = groups_of(graph)
    batches = [Batch({"input_ids": torch.randint(0, 50, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)})]
    obs, fisher = (score(method, graph, groups, batches) for method in ("obs", "fisher"))
    assert groups and all(obs[g.name].losses != fisher[g.name].losses for g in groups)


class Mixed(nn.Module):
    """A branch whose neurons end in a dense layer, and one whose neurons end in a convolution."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)
        self.up2, self.down2 = nn.Linear(6, 20), nn.Conv1d(20, 6, 1)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        return x + self.down2(torch.relu(self.up2(x)).transpose(1, 2)).transpose(1, 2)


def test_groups_that_feed_no_dense_layer_are_scored_by_fisher_on_the_same_scale():
    graph = capture(randomise(Mixed()), torch.randn(8, 5, 6))
    groups = groups_of(graph)
    batches = [Batch({"x": torch.randn(40, 5, 6)})]
    obs, fisher = (score(method, graph, groups, batches) for method in ("obs", "fisher"))
    linear, other = (g.name for g in groups)
    assert obs[other].order == fisher[other].order
    assert obs[other].losses[0] / fisher[other].losses[0] == pytest.approx(
        obs[linear].losses[0] / fisher[linear].losses[0]
    )
    alone = [g for g in groups if g.name == other]
    assert score("obs", graph, alone, batches) == score("fisher", graph, alone, batches)
