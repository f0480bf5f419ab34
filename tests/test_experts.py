"""Experts: masked equals cut, the routing that is left, how they are ranked, and wishes that cannot be had."""

from __future__ import annotations

import functools
import random

import pytest
import torch
import torch.nn.functional as F

from checks import groups_of, randomise, run_onnx
from moe_models import EXPERTS
from tilecut import PruneConfig, compile_pruned
from tilecut.make_cases import make_inputs
from tilecut_passes.calibration import check_batches
from tilecut_passes.capture import capture
from tilecut_passes.mask import Mask, gate
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_passes.score import score
from tilecut_runtime.errors import ConfigError, PlanError

SHAPES = ((2, 9), (3, 13))


@functools.lru_cache(maxsize=2)
def made(name):
    model = randomise(EXPERTS[name]())
    return model, capture(model)


def plan_of(graph, seed):
    """A random part of every layer's experts, in a random order."""
    rng = random.Random(seed)
    groups = groups_of(graph, "experts")
    kept = {g.name: rng.sample(range(g.size), rng.randint(g.least, max(g.size - 1, g.least))) for g in groups}
    return PrunePlan.keep_all(graph, groups).keeping(kept)


def after(graph, one):
    changed = graph.copy()
    run_passes(changed, [one])
    return changed


def batches(seeds=range(6)):
    out = []
    for seed in seeds:
        ids = torch.randint(0, 99, (4, 12), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[1, 7:] = mask[3, 5:] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


@pytest.mark.parametrize("name", EXPERTS)
def test_masked_equals_cut(name):
    _, graph = made(name)
    assert len(groups_of(graph, "experts")) >= 2
    moved = 0.0
    for seed in range(3):
        plan = plan_of(graph, seed)
        masked, cut = after(graph, Mask(plan)), after(graph, Prune(plan))
        for shape in SHAPES:
            inputs = make_inputs(graph, *shape, seed=seed)
            want = masked.run(inputs)
            assert largest_error(want, cut.run(inputs)) <= 1e-5
            moved = max(moved, largest_error(want, graph.run(inputs)))
    assert moved > 1e-3


def test_what_is_left_is_routed_as_the_dense_router_ranks_it():
    """Layer 0 of a Mixtral with half its experts: the best two of the remaining logits, weights their softmax."""
    model, graph = made("mixtral")
    groups = groups_of(graph, "experts")
    kept = [1, 3]
    plan = PrunePlan.keep_all(graph, groups).keeping({g.name: kept for g in groups})
    cut = after(graph, Prune(plan))
    assert cut.tensor("model.layers.0.mlp.experts.down_proj").shape[0] == 2
    for layer in range(2):
        for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            name = f"model.layers.{layer}.mlp.{part}"
            assert torch.equal(cut.tensor(name), graph.tensor(name)[kept])
    seen = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for layer in model.model.layers
    ]
    gates = [
        layer.mlp.gate.register_forward_hook(lambda mod, args, out: _route(mod, args[0], kept))
        for layer in model.model.layers
    ]
    inputs = make_inputs(graph, 2, 9, seed=0, ragged=False)
    with torch.no_grad():
        want = model(**inputs).logits
    for hook in hooks + gates:
        hook.remove()
    assert len(seen) == 2
    assert largest_error({"logits": want}, {"logits": cut.run(inputs)["logits"]}) <= 1e-5


def _route(gate, rows, kept):
    """What Mixtral's router returns, with only `kept` experts to choose from: logits, weights, choices."""
    logits = F.linear(rows.reshape(-1, rows.shape[-1]), gate.weight)
    best, which = logits[:, kept].softmax(-1).topk(2, -1)
    return logits, best / best.sum(-1, keepdim=True), torch.tensor(kept)[which]


def test_reap_is_the_mean_norm_of_weight_times_output_over_routed_tokens():
    model, graph = made("mixtral")
    given = batches(range(3))
    groups = groups_of(graph, "experts")
    found = score("reap", graph, groups, check_batches(graph, given))
    for layer, group in zip(model.model.layers, groups):
        experts, calls = layer.mlp.experts, []
        hook = experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
        sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4)
        with torch.no_grad():
            for batch in given:
                model(**batch)
                rows, choices, weights = calls.pop()
                for t in (batch["attention_mask"].flatten() != 0).nonzero().flatten():
                    for e, w in zip(choices[t].tolist(), weights[t]):
                        gate, up = (rows[t] @ experts.gate_up_proj[e].T).chunk(2)
                        sums[e] += (w * ((F.silu(gate) * up) @ experts.down_proj[e].T)).double().norm()
                        counts[e] += 1
        hook.remove()
        wanted = sums / counts.clamp_min(1)
        assert found[group.name].order == tuple(wanted.argsort().tolist())
        losses = torch.tensor(found[group.name].losses, dtype=torch.float64)
        lost = (losses[:-1] - losses[1:]).flip(0)
        assert torch.allclose(lost / lost.sum(), wanted.sort().values / wanted.sum(), rtol=1e-4)


def test_a_gate_scales_what_an_expert_adds():
    """A gate at 0.5 is the expert's last matrix halved; so is its gradient, which Fisher squares."""
    _, graph = made("mixtral")
    group = groups_of(graph, "experts")[1]
    gated = gate(graph, [group.name])
    halved = graph.copy()
    name = next(m.parameter for m in group.members if m.parameter.endswith("down_proj"))
    held = graph.tensor(name).detach().clone()
    held[2] *= 0.5
    halved.set_tensor(name, torch.nn.Parameter(held))
    halved.clean()
    inputs = make_inputs(graph, 3, 9, seed=2)
    vectors = gated.open_gates()
    vectors[group.name] = torch.tensor([1.0, 1.0, 0.5, 1.0])
    with torch.no_grad():
        assert largest_error(halved.run(inputs), gated.run(inputs, vectors)) <= 1e-5
    found = score("fisher", graph, [group], check_batches(graph, batches(range(2))))[group.name]
    assert all(more > less for more, less in zip(found.losses, found.losses[1:]))


@pytest.mark.parametrize("method", ["reap", "fisher", "table"])
def test_compiles_with_half_the_experts(method, tmp_path):
    model, dense = made("mixtral")
    config = PruneConfig(kinds=("experts",), sparsity=0.5, method=method, at={"sequence": 16}, cache="")
    artifact = compile_pruned(model, "edge", None, batches(range(10)), config, tmp_path / "out", measure=False)
    assert [len(g.kept) for g in artifact.plan.groups if g.kind == "experts"] == [2, 2]
    rungs = {r.name: r.status for r in artifact.manifest.verification}
    assert rungs["cut equals masked dense"] == rungs["artifact equals pruned model"] == "passed"
    inputs = make_inputs(dense, 3, 7, seed=4)
    with torch.no_grad():
        want = artifact.module()(**inputs)
    got = run_onnx(artifact.path / "model.onnx", inputs)
    real = inputs["attention_mask"] != 0
    assert torch.allclose(got["logits"][real], want["logits"][real], atol=1e-4, rtol=1e-4)


def test_a_budget_of_parameters_counts_experts_and_their_neurons_together(tmp_path):
    model, _ = made("mixtral")
    config = PruneConfig(
        kinds=("experts", "neurons"), max_params=33_000, method="table", at={"sequence": 16}, cache=""
    )
    artifact = compile_pruned(model, "edge", None, batches(range(10)), config, tmp_path / "out", measure=False)
    assert artifact.report["parameters"]["pruned"] <= 33_000


def test_fewer_experts_than_each_token_is_given_are_refused():
    model, graph = made("mixtral")
    config = PruneConfig(kinds=("experts",), sparsity=0.5, max_units={"experts": 1})
    with pytest.raises(ConfigError, match=r"fewer experts than each position is given; got 1; wanted at least 2"):
        compile_pruned(model, "edge", None, batches(), config, measure=False)
    groups = groups_of(graph, "experts")
    plan = PrunePlan.keep_all(graph, groups).keeping({groups[0].name: [2]})
    with pytest.raises(PlanError, match=r"keeps fewer experts than each position is given; got 1; wanted at least 2"):
        after(graph, Prune(plan))
