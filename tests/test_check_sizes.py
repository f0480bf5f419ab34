import pytest
import torch
import transformers
from torch import nn

from checks import bert_graph, mlp_graph, randomise
from tilecut.check_sizes import check_sizes
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_runtime.errors import CaptureError


def test_positions_that_a_model_keeps_for_itself_lower_the_limit():
    config = transformers.RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=42,
    )
    graph = capture(randomise(transformers.RobertaModel(config)))
    assert graph.ranges["sequence"].max == 42
    check_sizes(graph, "RobertaModel")
    assert graph.ranges["sequence"].max == 40
    assert "sequence is at most 40; the config says 42" in graph.notes[-1]


def test_a_limit_that_holds_stays():
    for graph in (bert_graph().copy(), mlp_graph().copy()):
        before, notes = dict(graph.ranges), list(graph.notes)
        check_sizes(graph, "Model")
        assert graph.ranges == before
        assert graph.notes == notes


class Pairs(nn.Module):
    """Takes rows two by two."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x.view(x.shape[0] // 2, 2, 8))))


def test_a_size_that_the_model_takes_in_multiples_is_an_expression():
    graph = capture(randomise(Pairs()), torch.randn(4, 8))
    assert graph.input_specs()[0].shape == ("2*batch_part", 8)
    check_sizes(graph, "Pairs")
    assert make_inputs(graph, 3, 9, seed=0)["x"].shape == (6, 8)


def test_a_size_that_the_code_cannot_take_is_an_error(monkeypatch):
    """torch.export vouches for every size in range; a graph that fails at the smallest was exported wrongly."""
    graph = mlp_graph().copy()

    def run(inputs):
        raise RuntimeError("shape '[0, 2, 8]' is invalid\nfor input of size 8")

    monkeypatch.setattr(graph, "run", run)
    with pytest.raises(
        CaptureError, match=r"smallest sizes, 1 in every dynamic dimension; got RuntimeError: shape '\[0, 2"
    ):
        check_sizes(graph, "Pairs")


class Positions(nn.Module):
    """Has rows for 40 positions, and no config that says so."""

    def __init__(self):
        super().__init__()
        self.places, self.up = nn.Embedding(40, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x + self.places(torch.arange(x.shape[1])))


def test_a_model_without_a_config_is_probed():
    graph = capture(randomise(Positions()), torch.randn(2, 7, 8))
    check_sizes(graph, "Positions")
    assert graph.ranges["sequence"].max == 40
    assert graph.notes[-1] == "capture: sequence is at most 40"
