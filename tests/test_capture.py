"""Capture: names, dynamic sizes, outputs, and errors that name the line."""

import pytest
import torch
import transformers
from torch import nn

from checks import bert_graph, randomise, text_batch, tiny_bert
from tilecut_passes.capture import capture
from tilecut_runtime.errors import CaptureError
from tilecut_runtime.manifest import DimRange, TensorSpec


def test_a_hugging_face_model_needs_no_example_inputs():
    graph = bert_graph()
    assert graph.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert graph.outputs == ("last_hidden_state", "pooler_output")
    assert graph.returns == "mapping"
    assert graph.input_specs()[0] == TensorSpec("input_ids", "int64", ("batch", "sequence"))
    assert graph.output_specs()[0] == TensorSpec("last_hidden_state", "float32", ("batch", "sequence", 32))
    assert graph.ranges == {"batch": DimRange(1, None), "sequence": DimRange(1, 512)}


@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (5, 64)])
def test_the_graph_gives_what_the_model_gives(shape):
    model = tiny_bert()
    inputs = text_batch(*shape)
    with torch.no_grad():
        want = model(**inputs)
    got = capture(model).run(inputs)
    assert torch.allclose(want.last_hidden_state, got["last_hidden_state"], atol=1e-5)
    assert torch.allclose(want.pooler_output, got["pooler_output"], atol=1e-5)


def test_tensors_keep_the_names_of_the_state_dict_and_are_shared():
    model = tiny_bert()
    state = dict(model.named_parameters())
    graph = capture(model)
    assert all(name in state or name in dict(model.named_buffers()) for name in graph.tensors)
    assert (
        graph.tensor("encoder.layer.0.output.dense.weight").data_ptr()
        == state["encoder.layer.0.output.dense.weight"].data_ptr()
    )


def test_training_mode_is_given_back():
    model = tiny_bert().train()
    model.encoder.layer[0].eval()
    capture(model)
    assert model.training and not model.encoder.layer[0].training and model.encoder.layer[1].training


def test_tied_weights_are_one_tensor_with_an_alias():
    config = transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    graph = capture(randomise(transformers.GPT2LMHeadModel(config)))
    ((alias, kept),) = graph.aliases.items()
    assert {alias, kept} == {"lm_head.weight", "transformer.wte.weight"}
    assert kept in graph.tensors and alias not in graph.tensors


class Many(nn.Module):
    """Nested outputs, a constant argument, positional inputs."""

    def forward(self, x, y, scale=2.0):
        return {"sum": x + y, "parts": (x * scale, [y]), "nothing": None}


def test_nested_outputs_get_path_names():
    graph = capture(Many(), (torch.randn(2, 3), torch.randn(2, 3), 3.0))
    assert graph.outputs == ("sum", "parts_0", "parts_1_0")
    assert graph.inputs == ("x", "y")
    x = torch.ones(4, 3)
    assert torch.equal(graph.run({"x": x, "y": x})["parts_0"], 3 * x)


def test_a_tensor_and_a_tuple_are_returned_as_such():
    assert capture(nn.Linear(3, 2), torch.randn(2, 3)).returns == "tensor"

    class Two(nn.Module):
        def forward(self, x):
            return x + 1, x - 1

    graph = capture(Two(), torch.randn(2, 3))
    assert (graph.returns, graph.outputs) == ("tuple", ("output_0", "output_1"))


def test_a_batch_of_one_is_dynamic_all_the_same():
    graph = capture(nn.Linear(3, 2), torch.randn(1, 3))
    assert graph.input_specs()[0].shape == ("batch", 3)
    assert graph.run({"input": torch.randn(7, 3)})["output"].shape == (7, 2)


def test_dynamic_shapes_can_be_named():
    graph = capture(nn.Linear(3, 2), {"input": torch.randn(2, 5, 7, 3)}, {"input": {0: "clips", 2: "frames"}})
    assert graph.input_specs()[0].shape == ("clips", 5, "frames", 3)


class Fixed(nn.Module):
    """Works on sequences of 5 only."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(5, 5)

    def forward(self, x):
        return self.mix(x.transpose(1, 2))


def test_a_size_that_the_model_fixes_is_static_and_noted():
    graph = capture(Fixed(), torch.randn(2, 5, 3))
    assert graph.input_specs()[0].shape == ("batch", 5, 3)
    assert "suggested fixes" in graph.notes[0]


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the line that stops export
            return x
        return -x


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_a_branch_on_data_names_the_line(capsys):
    with pytest.raises(
        CaptureError,
        match=r"Branches: torch.export stopped at .*test_capture.py:\d+ `if x.sum\(\) > 0:.*use torch.where",
    ):
        capture(Branches(), torch.randn(2, 3))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(3, 2), None, "no Hugging Face config to make inputs from; pass example_inputs"),
        (nn.Linear(3, 2), {"other": torch.randn(2, 3)}, "forward has no such input; got other; wanted one of input"),
        (Many(), {"x": torch.randn(2, 3)}, "example_inputs lacks y; got x; wanted x, y"),
        (nn.Linear(3, 2), torch.randn(2, 4), "torch.export stopped at"),
        (nn.Linear(3, 2), "text", "example_inputs must be a tensor, a tuple of tensors or a dict"),
        (
            nn.Linear(3, 2),
            {"input": object()},
            "tensors or plain constants, or structures of tensors; got input: object",
        ),
        (nn.Linear(3, 2), {"input": 3}, "holds no tensor"),
        (
            nn.Linear(3, 2),
            (torch.randn(2, 3), torch.randn(2, 3)),
            "more example inputs than forward takes; got 2; wanted at most 1",
        ),
        (Counts(), torch.randn(2, 3), "forward changes calls in place"),
        ("a string", None, "not a PyTorch model; got str"),
    ],
)
def test_what_cannot_be_captured_is_one_clear_error(model, inputs, message):
    with pytest.raises(CaptureError, match=message):
        capture(model, inputs)


def test_one_tensor_for_two_inputs_stays_two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Embedding(9, 4), nn.Embedding(9, 4)

        def forward(self, x, y):
            return self.first(x) + self.second(y)

    model, ids = Two().eval(), torch.ones(2, 5, dtype=torch.int64)
    graph = capture(model, {"x": ids, "y": ids})
    given = {"x": torch.full((2, 5), 3), "y": torch.full((2, 5), 7)}
    torch.testing.assert_close(graph.run(given)["output"], model(**given).detach())
