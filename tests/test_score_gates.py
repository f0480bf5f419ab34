"""Fisher information against jacobians written out in float64; its greedy order against trying everything."""

import itertools

import pytest
import torch

from checks import bert_graph, groups_of, mlp_graph, text_batch
from score_models import batches_of, scored
from tilecut_passes.calibration import check_batches
from tilecut_passes.score import score
from tilecut_passes.score_gates import fisher_matrices, remove_greedily
from tilecut_runtime.errors import CalibrationError

QUIET = {"progress": lambda done, of: None}


def gradients_by_hand(graph, batches):
    """d mse / d gate of every batch, from the formula of the two layers."""
    up, up_bias, down, down_bias = (
        graph.tensor(name).detach().double() for name in ("up.weight", "up.bias", "down.weight", "down.bias")
    )
    rows = []
    for batch in batches:
        hidden = torch.relu(batch.inputs["x"].double() @ up.T + up_bias)
        error = hidden @ down.T + down_bias - batch.labels.double()
        rows.append((2 * error @ down * hidden).sum(0) / error.numel())
    return torch.stack(rows)


@pytest.mark.parametrize("neurons", [3, 20])
def test_the_matrix_is_the_mean_of_outer_products(neurons):
    graph = mlp_graph(neurons=neurons, seed=neurons)
    groups = groups_of(graph)
    batches = batches_of("mlp", graph, count=5)
    g = gradients_by_hand(graph, batches)
    got = fisher_matrices(graph, groups, batches, 0, **QUIET)[groups[0].name]
    assert got.dtype == torch.float64
    assert torch.allclose(got, g.T @ g / 5, rtol=1e-3, atol=1e-5 * float(got.diagonal().max()))
    fisher = score("fisher", graph, groups, batches)[groups[0].name]
    assert fisher.losses[0] == pytest.approx(float(g.square().mean(0).sum()), rel=1e-3)
    taylor = score("taylor", graph, groups, batches)[groups[0].name]
    assert taylor.losses[0] == pytest.approx(float(g.mean(0).abs().sum()), rel=1e-3)


@pytest.mark.parametrize("model", ["bert", "llama", "conv"])
@pytest.mark.parametrize("labels", [True, False])
def test_the_diagonal_of_the_matrix_is_fisher(model, labels):
    graph, groups = scored(model)
    batches = batches_of(model, graph, labels=labels)
    diagonal = score("fisher", graph, groups, batches, seed=3)
    for name, matrix in fisher_matrices(graph, groups, batches, 3, **QUIET).items():
        assert torch.equal(matrix, matrix.T)
        assert float(matrix.trace()) == pytest.approx(diagonal[name].losses[0])
        # The mean of as many outer products as there are batches.
        assert int(torch.linalg.matrix_rank(matrix, hermitian=True)) <= len(batches)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_removal_takes_the_least_rise_every_time(seed):
    g = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fisher = g.T @ g

    def form(units):
        mask = torch.zeros(7, dtype=torch.float64)
        mask[list(units)] = 1
        return float(mask @ fisher @ mask)

    removed: list[int] = []
    forms = [0.0]
    while len(removed) < 7:
        left = [u for u in range(7) if u not in removed]
        removed.append(min(left, key=lambda u: form([*removed, u])))
        forms.append(form(removed))
    ranking = remove_greedily(fisher)
    assert list(ranking.order) == removed
    assert list(ranking.losses) == pytest.approx(list(itertools.accumulate(forms, max))[::-1], abs=1e-9)


def test_units_that_cancel_cost_less_together():
    """Fisher's diagonal prices two opposite units apart; the matrix knows that they go together for nothing."""
    g = torch.tensor([[1.0, -1.0, 0.9], [2.0, -2.0, 0.0]], dtype=torch.float64)
    ranking = remove_greedily(g.T @ g)
    assert ranking.order[0] == 2
    assert set(ranking.order[1:]) == {0, 1}
    assert remove_greedily(torch.eye(3, dtype=torch.float64)).order == (2, 1, 0)


def test_only_batches_with_labels_are_used_where_there_are_any():
    graph = bert_graph()
    groups = groups_of(graph)
    labelled, plain = batches_of("bert", graph), batches_of("bert", graph, labels=False)
    mixed = [plain[0], *labelled, plain[1]]
    for method in ("fisher", "taylor", "fisher_block", "sensitivity"):
        assert score(method, graph, groups, mixed) == score(method, graph, groups, labelled)
    assert score("fisher", graph, groups, mixed) != score("fisher", graph, groups, plain)


def test_nan_that_arises_on_the_way_names_the_layer():
    graph = bert_graph().copy()
    name = "encoder.layer.0.output.dense.weight"
    graph.set_tensor(name, torch.nn.Parameter(graph.tensor(name).detach() * 1e38))
    batches = check_batches(graph, [text_batch(4, 9)])
    for method in ("fisher", "fisher_block"):
        with pytest.raises(CalibrationError, match="activations at .* are not finite"):
            score(method, graph, groups_of(graph), batches)
