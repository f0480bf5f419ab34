"""Models captured with a key-value cache: one graph for the prompt and for every step, cut by the plan of the plain one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from checks import randomise
from tilecut import PruneConfig, compile_pruned
from tilecut.make_cases import make_inputs
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.example_inputs import inputs_with_cache
from tilecut_passes.graph import Graph
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune, as_cut
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import CaptureError, PlanError
from zoo import ZOO, HandGpt

LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma2", "falcon_gqa", "phi3", "gptj")]
DECODERS = ["gpt2", "llama_gqa", "mistral"]
SEQ2SEQ = ["t5", "bart", "whisper"]


def built(name: str) -> Any:
    """A model of the zoo with every number re-randomised."""
    return randomise(ZOO[name].build())


@functools.cache
def plain_graph(name: str) -> Graph:
    """The model without a cache; copy it before changing it."""
    return capture(built(name))


@functools.cache
def stepping_graph(name: str) -> Graph:
    """The model with a cache; copy it before changing it."""
    model = built(name)
    return capture(model, inputs_with_cache(model))


def groups(graph: Graph) -> list[tuple[str, int]]:
    """Kinds and sizes of what may be cut, but for the encoder's."""
    found = find_groups(infer(graph))
    return [(g.kind, g.size) for g in found if g.kind in ("heads", "kv_groups", "queries", "neurons")]


def cut_halves(graph: Graph) -> PrunePlan:
    """A plan that keeps every other unit."""
    chosen = [g for g in find_groups(infer(graph)) if g.kind in ("heads", "kv_groups", "queries", "neurons")]
    return PrunePlan.keep_all(graph, chosen).keeping({g.name: range(0, g.size, 2) for g in chosen})


def passed(graph: Graph, one: Any) -> Graph:
    """A copy of the graph after a pass."""
    changed = graph.copy()
    run_passes(changed, [one])
    return changed


def empty_cache(graph: Graph, rows: int) -> dict[str, Tensor]:
    """The cache of a decoder that has read nothing."""
    return {
        spec.name: torch.zeros([s if isinstance(s, int) else {"batch": rows}.get(s, 0) for s in spec.shape])
        for spec in graph.input_specs()
        if spec.name in graph.states
    }


def step(graph: Graph, ids: Tensor, mask: Tensor, cache: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of some tokens and the cache after them."""
    out = graph.run({"input_ids": ids, "attention_mask": mask, **cache})
    return out["logits"], {name: out[continued] for name, continued in graph.states.items()}


@pytest.mark.parametrize("name", [*DECODERS, *LONG])
def test_a_decoder_reads_the_prompt_and_goes_on(name):
    """Dense and cut: the plain graph on the whole text gives what the steps give, an empty cache included."""
    plain, stepping = plain_graph(name), stepping_graph(name)
    assert stepping.input_specs()[1].shape == ("batch", "past_sequence + sequence")
    assert set(stepping.states.values()) < set(stepping.outputs)
    assert groups(stepping) == groups(plain)

    plan = cut_halves(plain)
    of_steps = plan.for_graph(stepping, find_groups(infer(stepping)))
    assert [g.kept for g in of_steps.groups] == [g.kept for g in plan.groups]
    ids = torch.randint(1, 99, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for whole, steps in ((plain, stepping), (passed(plain, Prune(plan)), passed(stepping, Prune(of_steps)))):
        want = whole.run({"input_ids": ids, "attention_mask": mask})["logits"]
        first, cache = step(steps, ids[:, :4], mask[:, :4], empty_cache(steps, 3))
        parts = [first]
        for at in (range(4, 5), range(5, 9)):
            logits, cache = step(steps, ids[:, at.start : at.stop], mask[:, : at.stop], cache)
            parts.append(logits)
        assert largest_error({"logits": want}, {"logits": torch.cat(parts, 1)}) < 1e-4


@pytest.mark.parametrize("name", [*DECODERS[:2], *SEQ2SEQ])
def test_masked_equals_cut_with_a_cache(name):
    dense = stepping_graph(name)
    plan = cut_halves(dense)
    masked, cut, select = passed(dense, Mask(plan)), passed(dense, Prune(plan)), as_cut(dense, plan)
    assert any(a.shape != b.shape for a, b in zip(dense.input_specs(), cut.input_specs()) if a.name in dense.states)
    for i, (batch, length) in enumerate(((2, 6), (3, 8))):
        inputs = make_inputs(dense, batch, length, seed=i)
        want, got = select(masked.run(inputs)), cut.run(select(inputs))
        assert largest_error(want, got) < 1e-4
        other = dict(select(inputs))
        state = next(n for n in dense.states if other[n].shape[1] < inputs[n].shape[1])
        other[state] = inputs[state][:, : other[state].shape[1]]
        assert largest_error(want, cut.run(other)) > 1e-3


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_decoder_with_an_encoder_keeps_both_caches(name):
    model = built(name)
    example = inputs_with_cache(model)
    graph = stepping_graph(name)
    assert "decoder_input_ids" in graph.inputs and "encoder_outputs_0" in graph.inputs
    assert {"past_key_values_1_key", "past_key_values_1_encoder_value"} <= set(graph.states)
    with torch.no_grad():
        want = model(**inputs_with_cache(model)).last_hidden_state
    cache = {f"past_key_values_{i}_{k}": v for i, k, v in cache_parts(example["past_key_values"])}
    given = {k: v for k, v in example.items() if isinstance(v, Tensor)}
    got = graph.run({**given, "encoder_outputs_0": example["encoder_outputs"][0], **cache})["last_hidden_state"]
    assert torch.allclose(got, want, atol=1e-5)
    # The plain graph's plan, without its encoder.
    plan = cut_halves(plain_graph(name)).for_graph(graph, find_groups(infer(graph)))
    assert plan.groups and all("encoder." not in g.name.replace("decoder.", "") for g in plan.groups)
    passed(graph, Prune(plan))


def cache_parts(cache: Any) -> Any:
    """(layer, name, tensor) of a cache of both kinds."""
    for part, prefix in ((cache.self_attention_cache, ""), (cache.cross_attention_cache, "encoder_")):
        for i, layer in enumerate(part.layers):
            yield i, f"{prefix}key", layer.keys
            yield i, f"{prefix}value", layer.values


@pytest.mark.parametrize("name", ["llama_gqa", "t5"])
def test_an_artifact_with_a_cache_is_verified(name, tmp_path):
    model = built(name)
    config = PruneConfig(sparsity=0.5, method="magnitude")
    artifact = compile_pruned(model, "edge", inputs_with_cache(model), None, config, tmp_path / "out")
    assert {r.name for r in artifact.manifest.verification if r.status == "passed"} >= {
        "cut equals masked dense",
        "artifact equals pruned model",
    }
    assert artifact.report["latency"]["status"] == "not run"


def test_without_a_cache_none_comes_out():
    model = built("gpt2")
    graph = capture(model, {"input_ids": torch.randint(0, 99, (2, 7))})
    assert graph.outputs == ("logits",)
    assert "use_cache=False" in graph.notes[0]


def test_the_model_is_as_it_was():
    model = built("gpt2")
    forward = model.forward
    capture(model, inputs_with_cache(model))
    assert model.forward == forward and "forward" not in model.__dict__


def test_a_plan_of_another_model_is_refused():
    plan = cut_halves(plain_graph("llama_gqa"))
    other = capture(built("qwen2"))
    with pytest.raises(PlanError, match=r"PrunePlan: "):
        plan.matched(other, find_groups(infer(other)))
    small = capture(built("llama_mqa"))
    with pytest.raises(PlanError, match=r"tensor model\.layers\.0\.self_attn\.k_proj\.weight is another one; got"):
        plan.for_graph(small, find_groups(infer(small)))


def test_a_cache_that_keeps_a_window_is_refused():
    cache: Any = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    model = built("gpt2")
    with pytest.raises(CaptureError, match="keeps a window only; pass a DynamicCache made without a config"):
        capture(model, {"input_ids": torch.randint(0, 99, (2, 3)), "past_key_values": cache})


@pytest.mark.parametrize(
    ("model", "message"), [(HandGpt(), "no past_key_values"), (ZOO["bert"].build(), "no past_key")]
)
def test_a_model_without_a_cache_says_so(model, message):
    with pytest.raises(CaptureError, match=message):
        inputs_with_cache(model)


class Nested(torch.nn.Module):
    """Takes a structure of tensors."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)

    def forward(self, pair, named):
        return self.down(torch.relu(self.up(pair[0] + pair[1]))) + named["bias"]


def test_nested_inputs_are_flat():
    x = torch.randn(2, 4)
    graph = capture(randomise(Nested()), {"pair": (x, x), "named": {"bias": x}})
    assert graph.inputs == ("pair_0", "pair_1", "named_bias")
    assert graph.run({"pair_0": x, "pair_1": x, "named_bias": x})["output"].shape == (2, 4)
