"""Layers of one input as one product: graphs as text, what is left alone, numbers."""

import pytest
import torch
from torch import nn

from checks import bert_graph, op_names, randomise, run_onnx
from norm_models import llama
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.edge.forms import Forms, write_forms
from tilecut_targets.edge.merge_products import MergeProducts


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
    records = run_passes(made, [FuseAttention(), *forms.passes])
    assert [r.rewrites for r in records if r.name == "MergeProducts"] == [2]
    plain = op_names(graph).split().count("linear")
    assert op_names(made).split().count("linear") == plain - (4 if which == "qkv" else 2)
    write_forms(made, tmp_path / "m.onnx", forms)
    x = make_inputs(graph, 2, 7, seed=3, ragged=True)
    assert largest_error(run_onnx(tmp_path / "m.onnx", x), graph.run(x)) < 1e-4


def test_queries_keys_and_values_of_an_encoder():
    made = bert_graph().copy()
    groups = MergeProducts("qkv").match(made)
    assert [len(group) for group in groups] == [3, 3]
    run_passes(made, [MergeProducts("qkv")])
    x = make_inputs(made, 2, 7, seed=3, ragged=False)
    assert largest_error(made.run(x), bert_graph().run(x)) < 1e-5


def test_a_layer_without_bias_beside_others_gets_zeros():
    class Whisper(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)

        def forward(self, x):
            b, s, _ = x.shape
            return {"q": self.q(x).view(b, s, 2, 4), "k": self.k(x).view(b, s, 1, 4)}

    graph = capture(randomise(Whisper()), torch.randn(2, 5, 8))
    made = graph.copy()
    (record,) = run_passes(made, [MergeProducts("qkv")])
    assert record.rewrites == 1 and op_names(made).split().count("linear") == 1
    x = {"x": torch.randn(3, 4, 8)}
    assert largest_error(made.run(x), graph.run(x)) < 1e-6
    bias = next(t for name, t in made.tensors.items() if name.endswith("merged.bias"))
    assert torch.equal(bias[8:], torch.zeros(4))
