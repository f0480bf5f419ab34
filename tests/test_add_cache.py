"""A cache for decoders: numbers in steps against the whole text, shapes, tables, the last token, one refusal for each reason."""

import re

import pytest
import torch
from torch import nn

import zoo
from checks import op_names, random_plan, randomise
from generation_models import CONFIGS, POSITIONS, VOCAB, decoder, pair, written
from tilecut_passes.add_cache import AddCache
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.fuse_rms_norm import FuseRmsNorm
from tilecut_passes.fuse_rotary import FuseRotary
from tilecut_passes.graph import Graph, is_call
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import LoweringError
from tilecut_runtime.manifest import DimRange

FUSING = (FuseAttention(), FuseRmsNorm(), FuseRotary())
EMBEDDING = torch.ops.aten.embedding.default


def captured(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Graph:
    """With the limit of positions that a compile finds out (`check_sizes.py`)."""
    graph = capture(model, inputs, {name: {0: "batch", 1: "sequence"} for name in inputs})
    graph.ranges["sequence"] = DimRange(1, POSITIONS)
    return graph


def fused(graph: Graph) -> Graph:
    made = graph.copy()
    run_passes(made, FUSING)
    return made


def cached(graph: Graph, max_length: int | None = None) -> Graph:
    made = fused(graph)
    run_passes(made, [AddCache(max_length)])
    return made


def error_in_steps(
    whole: Graph, steps: Graph, first: tuple[int, ...] = (12, 5, 9), more: tuple[int, ...] = (1, 1, 3, 1)
) -> float:
    """The largest error of the logits of steps with a cache that holds NaN where nothing was written."""
    name = steps.inputs[0]
    batch, total = len(first), max(first) + sum(more)
    ids = torch.randint(0, VOCAB, (batch, total), generator=torch.Generator().manual_seed(3))
    masks = {n: torch.ones_like(ids) for n in whole.inputs if n != whole.inputs[0]}
    want = whole.run({whole.inputs[0]: ids, **masks})[steps.outputs[0]]
    cache = {
        spec.name: torch.full((batch, spec.shape[1], total + 2, spec.shape[3]), float("nan"))
        for spec in steps.input_specs()
        if spec.name in steps.states
    }
    past, worst = torch.zeros(batch, dtype=torch.int64), 0.0
    for i in range(1 + len(more)):
        lengths = torch.tensor(first) if i == 0 else torch.full((batch,), more[i - 1])
        places = (past[:, None] + torch.arange(int(lengths.max()))).clamp(max=total - 1)
        out = steps.run({name: ids.gather(1, places), "past_lengths": past, "lengths": lengths, **cache})
        past, cache = past + lengths, {given: out[made] for given, made in steps.states.items()}
        got = out[steps.outputs[0]][:, 0]
        worst = max(worst, float((got - want[torch.arange(batch), past - 1]).abs().max() / want.abs().max()))
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_of_a_model_equal_the_whole_text(name):
    graph = capture(decoder(name))
    made = cached(graph)
    assert error_in_steps(graph, made) < 1e-5
    assert "attention_mask" not in made.inputs
    assert made.ranges["capacity"].max == POSITIONS
    assert made.states == {f"past_key_values.{i}.{p}": f"present.{i}.{p}" for i in range(2) for p in ("key", "value")}


@pytest.mark.parametrize("name", ["opt", "gptj", "gpt_neox", "falcon_mqa", "phi3", "olmo2", "bloom"])
def test_models_of_other_makes(name):
    """Positions counted off the mask, rotary of neighbours or of a part, one KV head, fused projections, norms behind, ALiBi."""
    graph = capture(randomise(zoo.ZOO[name].build()))
    assert error_in_steps(graph, cached(graph)) < 1e-5


@pytest.mark.parametrize("positions", ["learned", "slice", "counted", "rotary", "none", "relative", "alibi", "ever"])
def test_steps_of_a_model_written_by_hand_equal_the_whole_text(positions):
    model, inputs = written(positions)
    made = cached(graph := captured(model, inputs))
    assert error_in_steps(graph, made) < 1e-5
    assert made.outputs[1:] == tuple(made.states.values())


def test_heads_and_widths_are_those_that_pruning_left():
    graph = capture(decoder("llama"))
    plan = random_plan(graph, 0, "kv_groups", "queries", "neurons", "qk_width", "vo_width")
    kept = {g.name: g.kept for g in plan.groups}
    first = next(g for g in plan.groups if g.kind == "kv_groups")
    plan = plan.keeping({**kept, first.name: first.kept[:1]})
    run_passes(graph, [Prune(plan)])
    made = cached(graph)
    assert error_in_steps(graph, made) < 1e-5
    shapes = [spec.shape for spec in made.input_specs() if spec.name in made.states]
    assert len({shape[1] for shape in shapes}) == 2


def test_a_removed_attention_has_no_cache():
    model, inputs = written(cut=True)
    made = cached(graph := captured(model, inputs))
    assert error_in_steps(graph, made) < 1e-5
    assert list(made.states) == ["past_key_values.0.key", "past_key_values.0.value"]


def test_the_logits_are_made_of_one_token_a_row():
    made = cached(capture(decoder("llama")))
    assert list(made.output_specs()[0].shape) == ["batch", 1, VOCAB]
    lines = op_names(made)
    # What follows the last attention's reshape runs on one token: its layer, the feed-forward network, the last norm.
    assert lines.count("embedding") == 1 + 2 + 2
    shapes = [tuple(n.meta["val"].shape)[1] for n in made.nodes if is_call(n, torch.ops.aten.linear.default)]
    assert shapes[-5:] == [1] * 5 and 1 not in shapes[:-5]


def test_equal_tables_are_held_once_and_read_once():
    made = cached(capture(decoder("llama")))
    tables = [name for name in made.tensors if name.endswith("_table")]
    assert len(tables) == 2
    assert {tuple(made.tensor(name).shape) for name in tables} == {(POSITIONS, 16)}


def test_biases_by_distance_are_as_short_as_they_may_be_and_held_once():
    made = cached(captured(*written("relative")))
    (name,) = [name for name in made.tensors if name.endswith("_distance_bias")]
    assert tuple(made.tensor(name).shape) == (4, 13)
    made = cached(captured(*written("ever")))
    assert [tuple(made.tensor(n).shape) for n in made.tensors if n.endswith("_distance_bias")] == [(4, POSITIONS)]


def test_a_bias_that_falls_by_one_number_a_place_goes_on_so():
    graph = capture(randomise(zoo.ZOO["bloom"].build()))
    made = cached(graph)
    (table,) = [made.tensor(name) for name in made.tensors if name.endswith("_distance_bias")]
    assert table.shape[1] == made.ranges["capacity"].max == 4096
    torch.testing.assert_close(table, table[:, 1:2] * torch.arange(table.shape[1]))


def test_a_bias_that_goes_on_changing_needs_fewer_positions():
    model, inputs = written("ever")
    graph = fused(captured(model, inputs))
    graph.ranges["sequence"] = DimRange(1, None)
    with pytest.raises(LoweringError, match=r"goes on changing with the distance; .*; give max_length=2048"):
        run_passes(graph.copy(), [AddCache()])
    assert run_passes(graph, [AddCache(64)])[0].rewrites == 2
    # A bias that is a line far behind is taken to go on; one that is looked at to its end is held to its end.
    made = graph.copy()
    assert [tuple(made.tensor(n).shape) for n in made.tensors if n.endswith("_distance_bias")] == [(4, 64)]


def test_a_second_run_rewrites_nothing():
    made = cached(capture(decoder("llama")))
    before = op_names(made)
    assert AddCache()(made) == 0
    assert op_names(made) == before


def test_fewer_positions_when_asked():
    made = cached(capture(decoder("llama")), max_length=40)
    assert made.ranges["capacity"].max == made.ranges["sequence"].max == 40
    with pytest.raises(LoweringError, match="the model has fewer positions; got max_length=200; wanted at most 128"):
        cached(capture(decoder("llama")), max_length=200)


class NoLogits(nn.Module):
    """Two outputs without names."""

    def __init__(self):
        super().__init__()
        self.inner = written()[0]

    def forward(self, ids):
        out = self.inner(ids)
        return out, out * 2


def refused(model, inputs, why):
    graph = fused(captured(model, inputs))
    with pytest.raises(LoweringError, match=why):
        run_passes(graph, [AddCache()])


@pytest.mark.parametrize(
    ("positions", "options", "why"),
    [
        ("learned", {"causal": False}, r"attention_default\w*: this attention is not causal"),
        ("learned", {"between": "convolution"}, r"conv1d\w*: \(aten.conv1d.default\) may mix tokens"),
        ("learned", {"between": "mean"}, r"mean\w*: \(aten.mean.dim\) works along the tokens"),
        ("learned", {"between": "shift"}, r"roll\w*: \(aten.roll.default\) may mix tokens"),
        ("learned", {"between": "running sum"}, r"cumsum\w*: \(aten.cumsum.default\) may mix tokens"),
        ("learned", {"between": "best tokens"}, r"topk\w*: \(aten.topk.default\) may mix tokens"),
        ("learned", {"between": "best rows"}, r"argsort\w*: \(aten.argsort.default\) may mix tokens"),
        ("learned", {"between": "pairs"}, r"matmul\w*: \(aten.matmul.default\) works along the tokens"),
        ("bias", {}, r"\w+ is a bias for pairs of positions that their distance does not tell"),
        ("stretched", {}, r"mul\w* holds other numbers for the same positions of a longer text"),
    ],
)
def test_what_mixes_positions_is_named(positions, options, why):
    model, inputs = written(positions, **options)
    refused(model, inputs, why)


def test_an_encoder_must_be_split_off_first():
    graph = fused(capture(pair("mbart")))
    with pytest.raises(LoweringError, match="the model has no one input of token ids; got input_ids, decoder_input_ids"):
        run_passes(graph, [AddCache()])


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_routers_of_experts_leave_tokens_apart(name):
    graph = capture(randomise(zoo.ZOO[name].build()))
    assert error_in_steps(graph, cached(graph)) < 1e-5


def test_several_outputs_need_a_name():
    _, inputs = written()
    refused(randomise(NoLogits()), inputs, "none of several outputs is called logits; got output_0, output_1")


class Typed(nn.Module):
    """Beside token ids their kinds, and weights."""

    def __init__(self):
        super().__init__()
        self.inner, self.kinds = written()[0], nn.Embedding(2, VOCAB)

    def forward(self, ids, kinds, weights=None):
        out = self.inner(ids) + self.kinds(kinds)
        return out if weights is None else out * weights[..., None]


def test_other_inputs_are_refused():
    ids = torch.randint(0, 2, (2, 9))
    inputs = {"ids": ids, "kinds": ids.clone()}
    refused(randomise(Typed()), inputs, "the model has no one input of token ids; got ids, kinds")
    refused(
        randomise(Typed()),
        {**inputs, "weights": torch.randn(2, 9)},
        "the input weights is neither token ids nor their mask",
    )


def test_a_fixed_length_is_refused():
    model, inputs = written()
    graph = fused(capture(model, inputs, {"ids": {0: "batch"}}))
    with pytest.raises(LoweringError, match=re.escape("the length of ids is not dynamic; got 9; wanted any from 1 on")):
        run_passes(graph, [AddCache()])
