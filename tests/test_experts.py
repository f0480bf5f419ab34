"""Experts go with their rows of the router: masked equals cut, and what is left is routed as it was among what is left."""

from __future__ import annotations

import pytest
import torch
import transformers

from checks import randomise
from test_models import made, outputs
from tilecut import PruneConfig, compile_pruned
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_passes.score import score
from tilecut_runtime.errors import ConfigError, PlanError

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral(experts: int = 4) -> transformers.MixtralForCausalLM:
    return randomise(transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=experts)))


MODELS = {
    "mixtral": mixtral,
    "qwen2_moe": lambda: made("qwen2_moe")[0],
    "olmoe": lambda: randomise(transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**TEXT, num_experts=6))),
    "qwen3_moe": lambda: randomise(
        transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**TEXT, num_experts=6, moe_intermediate_size=24, head_dim=8, decoder_sparse_step=1)
        )
    ),
}


def experts_of(graph):
    return [g for g in find_groups(infer(graph)) if g.kind == "experts"]


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_cut(name):
    graph = capture(MODELS[name]())
    groups = experts_of(graph)
    assert len(groups) == 2
    plan = PrunePlan.keep_all(graph, groups).keeping({g.name: [1, *range(3, g.size)] for g in groups})
    want = outputs(graph, Mask(plan))
    for a, b, dense in zip(want, outputs(graph, Prune(plan)), outputs(graph, Mask(PrunePlan.keep_all(graph, []))), strict=True):
        assert largest_error(a, b) <= 1e-5
        assert largest_error(a, dense) > 1e-3


def test_what_is_left_is_routed_as_among_what_is_left():
    model = mixtral()
    graph = capture(model)
    groups = experts_of(graph)
    kept = [0, 3]
    plan = PrunePlan.keep_all(graph, groups).keeping({g.name: kept for g in groups})
    cut = graph.copy()
    run_passes(cut, [Prune(plan)])
    # The same by hand: a Mixtral of two experts with the rows and matrices that stay.
    small = transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=2))
    held = model.state_dict()
    own = {
        name: held[name][kept] if held[name].shape != tensor.shape else held[name]
        for name, tensor in small.state_dict().items()
    }
    small.load_state_dict(own)
    # The rotary table was given other numbers too, and is no part of a state_dict.
    for buffer, other in zip(small.buffers(), model.buffers(), strict=True):
        buffer.copy_(other)
    ids = torch.randint(0, 99, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        want = small.eval()(input_ids=ids, attention_mask=mask).logits
    got = cut.run({"input_ids": ids, "attention_mask": mask})["logits"]
    assert largest_error({"logits": want}, {"logits": got}) <= 1e-5


@pytest.mark.parametrize("importance", ["reap", "fisher", "magnitude"])
def test_importances_rank_experts(importance):
    graph = capture(mixtral())
    groups = experts_of(graph)
    ids = torch.randint(1, 99, (4, 16), generator=torch.Generator().manual_seed(0))
    rankings = score(importance, graph, groups, [Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})])
    for g in groups:
        assert sorted(rankings[g.name].order) == list(range(g.size))


@pytest.mark.parametrize("method", ["reap", "table", "magnitude"])
def test_an_artifact_with_half_of_the_experts(method, tmp_path):
    model = mixtral()
    ids = torch.randint(1, 99, (16, 24), generator=torch.Generator().manual_seed(0))
    calibration = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids.split(4)]
    config = PruneConfig(kinds=("experts",), max_units={"experts": 2}, sparsity=0.0, method=method, cache="")
    report = compile_pruned(model, "edge", None, calibration, config, tmp_path / "out", measure=False).report
    assert [g["kept"] for g in report["groups"] if g["kind"] == "experts"] == [2, 2]
    rungs = {r["name"]: r["status"] for r in report["verification"]}
    assert rungs["artifact equals pruned model"] == rungs["cut equals masked dense"] == "passed"


def test_fewer_experts_than_top_k():
    with pytest.raises(ConfigError, match="fewer experts than each position is given"):
        config = PruneConfig(kinds=("experts",), max_units={"experts": 1}, method="magnitude")
        compile_pruned(mixtral(), config=config, output="never", measure=False)
    graph = capture(mixtral())
    plan = PrunePlan.keep_all(graph, experts_of(graph)).keeping({g.name: [0] for g in experts_of(graph)})
    with pytest.raises(PlanError, match="fewer experts than each position is given"):
        Prune(plan)(graph)


def test_parameters_drive_experts(tmp_path):
    model = mixtral(8)
    budget = int(0.7 * sum(p.numel() for p in model.parameters()))
    config = PruneConfig(kinds=("experts", "neurons"), max_params=budget, method="magnitude")
    report = compile_pruned(model, "edge", config=config, output=tmp_path / "out", measure=False).report
    assert report["parameters"]["pruned"] <= budget
