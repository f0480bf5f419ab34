"""Layers of one input as one product: graphs as text, what is left alone, numbers."""

import pytest
import torch
from torch import nn

from checks import bert_graph, op_names, randomise, run_onnx
from norm_models import llama
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.edge.forms import Forms, write_forms
from tilecut_targets.edge.merge_products import MergeProducts
from tilecut_targets.edge.target import EdgeTarget


class Gated(nn.Module):
    """Gates of several makes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 12, bias=False), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)
        self.tied = nn.Linear(8, 12)
        self.tied.weight = self.d.weight
        self.e, self.f = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x, y):
        both = self.c(x)
        return {
            "swiglu": nn.functional.silu(self.a(x)) * self.b(x),
            "read_twice": torch.tanh(both) * self.d(x) + both,
            "stored_for_two": nn.functional.gelu(self.tied(x)) * self.d(x),
            "two_inputs": nn.functional.silu(self.e(x)) * self.f(y),
        }


@pytest.fixture(scope="module")
def gated():
    return capture(randomise(Gated()), {"x": torch.randn(2, 5, 8), "y": torch.randn(2, 5, 8)})


def test_a_gate_before_and_after(gated):
    made = gated.copy()
    (record,) = run_passes(made, [MergeProducts("gate")])
    assert record.rewrites == 1
    assert op_names(gated).split().count("linear") == 8 and op_names(made).split().count("linear") == 7
    assert "linear split_with_sizes getitem getitem silu mul" in op_names(made)
    x = {"x": torch.randn(3, 5, 8), "y": torch.randn(3, 5, 8)}
    assert largest_error(made.run(x), gated.run(x)) < 1e-6
    assert MergeProducts("gate")(made) == 0


def test_what_is_left_alone(gated):
    (group,) = MergeProducts("gate").match(gated)
    assert len(group) == 2
    assert not MergeProducts("qkv").match(gated)


@pytest.mark.parametrize("which", ["qkv", "gate"])
def test_a_decoder_before_and_after(which, tmp_path):
    graph = capture(llama())
    forms = Forms(**{which: "one product and Split", "other_attention": "Attention of opset 23"})
    made = graph.copy()
    records = run_passes(made, [*EdgeTarget().fusing, *forms.passes])
    assert [r.rewrites for r in records if r.name == "MergeProducts"] == [2]
    plain = op_names(graph).split().count("linear")
    assert op_names(made).split().count("linear") == plain - (4 if which == "qkv" else 2)
    write_forms(made, tmp_path / "m.onnx", forms)
    x = make_inputs(graph, 2, 7, seed=3, ragged=True)
    assert largest_error(run_onnx(tmp_path / "m.onnx", x), graph.run(x)) < 1e-4


def test_an_activation_that_gates_two_layers_is_merged_with_the_first():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)

        def forward(self, x):
            gate = nn.functional.silu(self.a(x))
            return {"b": gate * self.b(x), "c": gate * self.c(x)}

    graph = capture(randomise(Shared()), torch.randn(2, 5, 8))
    made = graph.copy()
    (record,) = run_passes(made, [MergeProducts("gate")])
    assert record.rewrites == 1 and op_names(made).split().count("linear") == 2
    x = {"x": torch.randn(3, 4, 8)}
    assert largest_error(made.run(x), graph.run(x)) < 1e-6


def test_layers_that_an_attention_packs_are_left_to_it():
    made = bert_graph().copy()
    run_passes(made, EdgeTarget().fusing)
    assert MergeProducts("qkv").match(made) == []


class Crossed(nn.Module):
    """Two attentions to one other sequence: the keys and values of each are a group."""

    def __init__(self):
        super().__init__()
        self.q = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.k = nn.ModuleList(nn.Linear(8, 8, bias=i == 0) for i in range(2))
        self.v = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x, y):
        for q, k, v in zip(self.q, self.k, self.v):
            heads = [layer(z).view(z.shape[0], z.shape[1], 2, 4).transpose(1, 2) for layer, z in ((q, x), (k, y), (v, y))]
            x = x + nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return {"out": x}


def test_keys_and_values_of_each_attention_are_a_group_and_missing_biases_are_zeros():
    dims = {"x": {0: "batch", 1: "queries"}, "y": {0: "batch", 1: "keys"}}
    graph = capture(randomise(Crossed()), {"x": torch.randn(2, 5, 8), "y": torch.randn(2, 7, 8)}, dims)
    made = graph.copy()
    run_passes(made, EdgeTarget().fusing)
    assert [len(group) for group in MergeProducts("qkv").match(made)] == [2, 2]
    run_passes(made, [MergeProducts("qkv")])
    assert op_names(made).split().count("linear") == 4
    x = {"x": torch.randn(3, 4, 8), "y": torch.randn(3, 6, 8)}
    assert largest_error(made.run(x), graph.run(x)) < 1e-5
    second = [t for name, t in sorted(made.tensors.items()) if name.endswith("merged.bias")][1]
    assert torch.equal(second[:8], torch.zeros(8))
