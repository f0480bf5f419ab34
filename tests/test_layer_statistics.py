"""Gram matrices and Fisher factors against sums over rows in float64."""

import pytest
import torch

from checks import bert_graph, mlp_graph, text_batch
from tilecut_passes import share_batches
from tilecut_passes.calibration import check_batches
from tilecut_passes.layer_statistics import collect_statistics
from tilecut_runtime.errors import CalibrationError

SILENT = lambda done, of: None


def test_grams_are_the_sums_over_rows():
    graph = mlp_graph()
    x = torch.randn(30, 12)
    batches = check_batches(graph, [{"x": part} for part in x.split(8)])
    found = collect_statistics(graph, ["linear_1"], batches, 0, False, SILENT)["linear_1"]
    hidden = torch.relu(x.double() @ graph.tensor("up.weight").double().T + graph.tensor("up.bias").double()).detach()
    design = torch.cat([hidden, torch.ones(30, 1, dtype=torch.float64)], 1)
    assert torch.allclose(found.gram, design.T @ design, rtol=1e-5)
    assert found.rows == 30
    assert found.fisher is None


def test_fisher_is_the_sum_of_outer_products_of_gradients():
    graph = mlp_graph()
    x, labels = torch.randn(16, 12), torch.randint(0, 3, (16,))
    batches = check_batches(graph, [{"x": x, "labels": labels}])
    found = collect_statistics(graph, ["linear_1"], batches, 0, True, SILENT)["linear_1"]
    logits = graph.run({"x": x})["output"].double().requires_grad_()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    assert torch.allclose(found.fisher, logits.grad.T @ logits.grad, rtol=1e-4, atol=1e-9)


def test_padding_does_not_count():
    graph = bert_graph()
    (one,) = check_batches(graph, [text_batch(3, 9)])
    node = next(n.name for n in graph.nodes if "linear" in n.name)
    found = collect_statistics(graph, [node], [one], 0, False, SILENT)[node]
    assert found.rows == float(one.inputs["attention_mask"].sum()) < 27
    assert found.gram[-1, -1] == found.rows


@pytest.mark.parametrize("gradients", [False, True])
def test_shares_of_several_processes_add_up(monkeypatch, gradients):
    graph = bert_graph()
    batches = check_batches(graph, [text_batch(2, 7, seed=i) for i in range(5)])
    node = [n.name for n in graph.nodes if "linear" in n.name][-2]
    whole = collect_statistics(graph, [node], batches, 3, gradients, SILENT)[node]
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(share_batches, "process", lambda rank=rank: (rank, 2))
        monkeypatch.setattr("tilecut_passes.layer_statistics.total", lambda value: value)
        parts.append(collect_statistics(graph, [node], batches, 3, gradients, SILENT)[node])
    assert torch.allclose(parts[0].gram + parts[1].gram, whole.gram)
    assert parts[0].rows + parts[1].rows == whole.rows
    if gradients:
        assert torch.allclose(parts[0].fisher + parts[1].fisher, whole.fisher)


def test_what_is_not_finite_names_the_layer():
    graph = mlp_graph()
    bad = graph.copy()
    bad.set_tensor("up.bias", torch.nn.Parameter(torch.full((20,), float("inf"))))
    batches = check_batches(graph, [{"x": torch.randn(4, 12)}])
    with pytest.raises(CalibrationError, match=r"down\.weight are not finite"):
        collect_statistics(bad, ["linear_1"], batches, 0, False, SILENT)
