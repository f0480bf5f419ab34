import pytest
import torch

from checks import bert_graph, mlp_graph, text_batch
from tilecut.measure_fidelity import measure_fidelity
from tilecut_passes.calibration import Batch


def test_a_graph_is_at_one_and_zero_from_itself():
    graph = bert_graph()
    got = measure_fidelity(graph, graph, [Batch(text_batch(3, 9, seed=i)) for i in range(2)])
    assert got == {
        "last_hidden_state": {"cosine": 1.0, "relative_error": 0.0},
        "pooler_output": {"cosine": 1.0, "relative_error": 0.0},
    }


def test_figures_are_those_of_the_formula_and_padding_does_not_count():
    dense, pruned = bert_graph(), bert_graph().copy()
    with torch.no_grad():
        pruned.tensor("encoder.layer.1.output.LayerNorm.bias").add_(0.3)
    batch = Batch(text_batch(3, 9, seed=4))
    keep = batch.inputs["attention_mask"] != 0
    a, b = (g.run(batch.inputs)["last_hidden_state"][keep].double() for g in (dense, pruned))
    got = measure_fidelity(dense, pruned, [batch])["last_hidden_state"]
    assert got["cosine"] == pytest.approx(float(((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()), abs=2e-6)
    assert got["relative_error"] == pytest.approx(float((a - b).norm() / a.norm()), abs=2e-6)


def test_labels_give_loss_and_accuracy_of_both():
    dense, pruned = mlp_graph(seed=0), mlp_graph(seed=1)
    x = torch.randn(50, 12)
    labels = dense.run({"x": x})[dense.outputs[0]].argmax(-1)
    labels[:10] = (labels[:10] + 1) % 3
    labels[10:20] = -100
    task = measure_fidelity(dense, pruned, [Batch({"x": x}, labels)])["task"]
    assert task["dense_accuracy"] == pytest.approx(30 / 40)
    right = (pruned.run({"x": x})[pruned.outputs[0]].argmax(-1) == labels)[labels != -100]
    assert task["pruned_accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert task["dense_loss"] < task["pruned_loss"]
