"""Attention with a cache as onnxruntime's op: what goes into it, numbers in steps against torch, odd heads, refusals."""

import collections

import onnx
import pytest
import torch
import transformers

from checks import random_plan, randomise, run_onnx
from generation_models import CONFIGS, GROUPED, decoder, written
from test_add_cache import captured, error_in_steps
from tilecut_passes.add_cache import AddCache
from tilecut_passes.capture import capture
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import LoweringError
from tilecut_targets.edge.forms import Forms, write_forms
from tilecut_targets.edge.lower_cached_attention import LowerCachedAttention
from tilecut_targets.edge.onnx_products import attribute
from tilecut_targets.edge.pad_heads import PadHeads
from tilecut_targets.edge.target import EdgeTarget


class Written:
    """An ONNX file of a graph that generates, called as the graph is."""

    def __init__(self, graph, path):
        self.graph, self.path = graph, path
        fused = graph.copy()
        run_passes(fused, [*EdgeTarget().fusing, *EdgeTarget().before_caching, *EdgeTarget().caching()])
        self.inputs, self.outputs, self.states, self.specs = (
            fused.inputs,
            fused.outputs,
            fused.states,
            fused.input_specs(),
        )
        run_passes(fused, EdgeTarget().lowering)
        write_forms(fused, path, Forms())
        nodes = onnx.load(str(path)).graph.node
        self.counts = collections.Counter(n.op_type for n in nodes)
        self.attentions = [n for n in nodes if n.op_type == "GroupQueryAttention"]

    def input_specs(self):
        return self.specs

    def run(self, inputs):
        return run_onnx(self.path, inputs)

    @property
    def packed(self):
        return [not n.input[1] for n in self.attentions]

    @property
    def turned(self):
        return [attribute(n, "do_rotary", 0) for n in self.attentions]

    def error(self):
        """Of a ragged batch in steps of one token, and of one row in steps of several."""
        ragged = error_in_steps(self.graph, self, more=(1, 1, 1, 1))
        return max(ragged, error_in_steps(self.graph, self, first=(6,), more=(1, 3, 1, 4)))


# Whether the op turns queries and keys itself, whether it reads them as one, and how many products there are.
TAKEN = {
    "gpt2": (0, True, 1),
    "llama": (1, True, 11),
    "mistral": (1, True, 11),
    "qwen3": (1, False, 15),
    "gemma2": (1, True, 11),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_in_steps(name, tmp_path):
    made = Written(capture(decoder(name)), tmp_path / "model.onnx")
    turned, packed, products = TAKEN[name]
    assert made.turned == [turned] * 2
    assert made.packed == [packed] * 2
    assert made.counts["MatMul"] == products
    assert made.counts["Softmax"] == made.counts["RotaryEmbedding"] == 0
    assert made.error() < 1e-5


def test_windows_and_soft_caps_are_attributes(tmp_path):
    made = Written(capture(decoder("gemma2")), tmp_path / "model.onnx")
    # transformers' window of 9 sees 8 tokens back, onnxruntime's of 9 the same.
    assert [attribute(n, "local_window_size", None) for n in made.attentions] == [9, -1]
    assert [attribute(n, "softcap", 0.0) for n in made.attentions] == [50.0, 50.0]
    assert [attribute(n, "scale", 0.0) for n in made.attentions] == [0.0625, 0.0625]


@pytest.mark.parametrize("positions", ["learned", "slice", "counted", "rotary", "relative", "alibi"])
def test_models_written_by_hand_in_steps(positions, tmp_path):
    made = Written(captured(*written(positions)), tmp_path / "model.onnx")
    # One layer of queries, keys and values is read as it is, unless something turns them.
    assert made.packed == [positions != "rotary"] * 2
    assert made.error() < 1e-5


@pytest.mark.parametrize(("head", "part", "outside"), [(8, 1.0, 4), (12, 1.0, 4), (32, 0.5, 4)])
def test_rotary_that_the_op_does_not_take_stays_an_op(head, part, outside, tmp_path):
    sizes = {**GROUPED, "hidden_size": 4 * head, "layer_norm_eps": 1e-5}
    config = transformers.StableLmConfig(**sizes, partial_rotary_factor=part)
    model = transformers.StableLmForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    made = Written(capture(model.eval()), tmp_path / "model.onnx")
    assert made.counts["RotaryEmbedding"] == outside
    assert made.turned == [0] * 2
    assert made.error() < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_pruned_heads_of_any_width(seed, tmp_path):
    graph = capture(decoder("llama"))
    plan = random_plan(graph, seed, "kv_groups", "queries", "neurons", "qk_width", "vo_width")
    run_passes(graph, [Prune(plan)])
    made = Written(graph, tmp_path / "model.onnx")
    assert made.error() < 1e-5
    assert {spec.shape[3] % 8 for spec in made.input_specs() if spec.name in made.states} == {0}


def test_products_may_stay_apart(tmp_path):
    graph = capture(decoder("llama"))
    run_passes(graph, [*EdgeTarget().fusing, *EdgeTarget().before_caching, *EdgeTarget().caching()])
    assert run_passes(graph, [LowerCachedAttention(packed=False)])[0].rewrites == 2
    assert sum(n.target is torch.ops.aten.linear.default for n in graph.nodes) == 15
    assert run_passes(graph, [LowerCachedAttention(packed=False)])[0].rewrites == 0


def test_heads_that_were_not_padded_are_refused():
    graph = captured(*written())
    plan = random_plan(graph, 1, "vo_width")
    run_passes(graph, [Prune(plan), *EdgeTarget().fusing, AddCache()])
    with pytest.raises(
        LoweringError, match=r"has heads that the op does not take; got \[8, 8, \d\]; wanted one multiple of 8"
    ):
        run_passes(graph, [LowerCachedAttention()])


def test_padding_changes_no_number_and_is_done_once():
    graph = captured(*written())
    run_passes(graph, [Prune(random_plan(graph, 1, "vo_width")), *EdgeTarget().fusing])
    given = {"ids": torch.randint(0, 90, (2, 9))}
    want = graph.run(given)["output"]
    assert run_passes(graph, [PadHeads()])[0].rewrites > 0
    torch.testing.assert_close(graph.run(given)["output"], want)
    assert PadHeads()(graph) == 0


def test_a_tied_layer_is_not_packed(tmp_path):
    model = randomise(transformers.LlamaForCausalLM(CONFIGS["llama"]()))
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight
    made = Written(capture(model), tmp_path / "model.onnx")
    assert made.packed == [False, False]
    assert made.error() < 1e-5
