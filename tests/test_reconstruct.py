"""The refit against least squares in float64, and what it repairs."""

import pytest
import torch
import transformers
from torch import nn

from checks import bert_graph, groups_of, mlp_graph, random_plan, randomise, text_batch
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.reconstruct import Reconstruct, find_sites
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import CalibrationError


def pruned(graph, kept):
    cut = graph.copy()
    run_passes(cut, [Prune(PrunePlan.keep_all(graph, groups_of(graph)).keeping(kept))])
    return cut


def test_it_is_the_least_squares_solution():
    graph = mlp_graph(neurons=16)
    (group,) = groups_of(graph)
    cut = pruned(graph, {group.name: range(9)})
    x = torch.randn(300, 12)
    batches = check_batches(graph, [{"x": part} for part in x.split(50)])
    assert run_passes(cut, [Reconstruct(graph, batches, ridge=1e-9)])[0].rewrites == 1
    hidden = torch.relu(x @ graph.tensor("up.weight").T + graph.tensor("up.bias")).double().detach()
    design = torch.cat([hidden[:, :9], torch.ones(300, 1)], 1)
    target = graph.run({"x": x})["output"].double()
    solution = torch.linalg.lstsq(design, target).solution
    assert torch.allclose(cut.tensor("down.weight").double(), solution[:-1].T, atol=1e-4)
    assert torch.allclose(cut.tensor("down.bias").double(), solution[-1], atol=1e-4)


def test_units_that_the_rest_can_express_are_repaired_exactly():
    graph = mlp_graph(neurons=10)
    for name in ("up.weight", "up.bias"):
        tensor = graph.tensor(name).detach().clone()
        tensor[8], tensor[9] = tensor[0], tensor[1]
        graph.set_tensor(name, torch.nn.Parameter(tensor))
    (group,) = groups_of(graph)
    cut = pruned(graph, {group.name: range(8)})
    x = {"x": torch.randn(200, 12)}
    assert largest_error(graph.run(x), cut.run(x)) > 1e-2
    run_passes(cut, [Reconstruct(graph, check_batches(graph, [x]), ridge=1e-7)])
    assert largest_error(graph.run(x), cut.run(x)) < 1e-3


def test_later_layers_repair_what_earlier_ones_lost():
    """With the residual correction, what one branch lost is in the next one's target."""
    graph = bert_graph()
    cut = pruned(graph, {g.name: range(g.size // 2) for g in groups_of(graph)})
    fit = check_batches(graph, [text_batch(16, 30, seed=i) for i in range(12)])
    held_out = text_batch(16, 30, seed=99)
    want = graph.run(held_out)["last_hidden_state"]

    def distance(g):
        return float((g.run(held_out)["last_hidden_state"] - want)[held_out["attention_mask"] != 0].norm())

    before = distance(cut)
    assert run_passes(cut, [Reconstruct(graph, fit)])[0].rewrites == 4
    assert distance(cut) < 0.8 * before


def test_every_cut_layer_has_a_site_with_its_residual():
    graph = bert_graph()
    cut = pruned(graph, {g.name: range(g.size // 2) for g in groups_of(graph)})
    sites = find_sites(graph, cut)
    assert [s.layer.weight for s in sites] == [
        "encoder.layer.0.attention.output.dense.weight", "encoder.layer.0.output.dense.weight",
        "encoder.layer.1.attention.output.dense.weight", "encoder.layer.1.output.dense.weight",
    ]  # fmt: skip
    assert all(s.residual for s in sites)


def test_a_dense_graph_has_nothing_to_refit():
    graph = mlp_graph()
    assert Reconstruct(graph, check_batches(graph, [{"x": torch.randn(4, 12)}]))(graph.copy()) == 0


def test_padding_does_not_count():
    graph = bert_graph()
    kept = {g.name: range(g.size // 2) for g in groups_of(graph)}
    short = [text_batch(8, 12, seed=i) for i in range(4)]
    padded = [{k: torch.nn.functional.pad(v, (0, 7), value=int(k == "input_ids")) for k, v in b.items()} for b in short]
    a, b = pruned(graph, kept), pruned(graph, kept)
    run_passes(a, [Reconstruct(graph, check_batches(graph, short))])
    run_passes(b, [Reconstruct(graph, check_batches(graph, padded))])
    assert largest_error(a.run(short[0]), b.run(short[0])) < 1e-3


def test_nan_is_named():
    graph = mlp_graph()
    (group,) = groups_of(graph)
    cut = pruned(graph, {group.name: range(5)})
    weight = cut.tensor("up.weight").detach().clone()
    weight[0, 0] = float("inf")
    cut.set_tensor("up.weight", torch.nn.Parameter(weight))
    with pytest.raises(CalibrationError, match=r"activations at down\.weight are not finite"):
        Reconstruct(graph, check_batches(graph, [{"x": torch.randn(4, 12)}]))(cut)


class Shared(nn.Module):
    """The same two layers twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(x)))
        return self.down(torch.relu(self.up(x)))


def test_what_is_not_refitted_is_said():
    dense = capture(randomise(Shared()), torch.randn(8, 6))
    plan = random_plan(dense, 1, "neurons")
    pruned = dense.copy()
    run_passes(pruned, [Prune(plan)])
    assert run_passes(pruned, [Reconstruct(dense, [Batch({"x": torch.randn(8, 6)})])])[0].rewrites == 0
    assert {(r.by, r.why) for r in pruned.refusals} == {("Reconstruct", "its weight or bias is shared")}


def gpt2_graph():
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=64)
    return capture(randomise(transformers.GPT2Model(config)))


def test_transposed_weights_are_refitted_too():
    """GPT-2 keeps its weights as [I, O] and calls addmm on flattened rows."""
    dense = gpt2_graph()
    cut = pruned(dense, {g.name: range(g.size // 2) for g in groups_of(dense)})
    assert [(s.layer.weight, s.layer.transposed) for s in find_sites(dense, cut)] == [
        (f"h.{i}.{name}.c_proj.weight", True) for i in range(2) for name in ("attn", "mlp")
    ]
    residuals = [s.residual for s in find_sites(dense, cut)]
    assert all(residuals) and len(set(residuals)) == 4
    ids = [torch.randint(0, 50, (8, 20), generator=torch.Generator().manual_seed(i)) for i in range(5)]
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    want = dense.run(batches[-1])["last_hidden_state"]
    before = (cut.run(batches[-1])["last_hidden_state"] - want).square().mean()
    assert run_passes(cut, [Reconstruct(dense, check_batches(dense, batches[:-1]))])[0].rewrites == 4
    assert (cut.run(batches[-1])["last_hidden_state"] - want).square().mean() < 0.5 * before
    assert not cut.refusals
