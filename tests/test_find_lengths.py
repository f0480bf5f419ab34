"""Inputs that are lengths, found by what they are compared with; reference inputs then hold at least one key in each row."""

import pytest
import torch
from torch import nn

from tilecut import compile_pruned
from tilecut.find_lengths import find_lengths
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.graph import sizes_of, value_of

DYNAMIC = {"x": {0: "batch", 1: "sequence"}, "lengths": {0: "batch"}}


class Attends(nn.Module):
    """x [B, S, 16] on its first `lengths` keys, as `keep` spells it."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, x, lengths):
        mask = self.keep(torch.arange(x.shape[1]), lengths[:, None], x.shape[1])
        return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask[:, None, None])[:, 0]


SPELLINGS = {
    "lt": lambda places, lengths, total: places < lengths,
    "le": lambda places, lengths, total: places <= lengths - 1,
    "gt": lambda places, lengths, total: lengths > places,
    "not ge": lambda places, lengths, total: ~(places >= lengths),
    "float": lambda places, lengths, total: places.float() < lengths.float(),
    "left": lambda places, lengths, total: places >= total - lengths,
}


def graph_of(keep):
    example = {"x": torch.randn(2, 7, 16), "lengths": torch.tensor([7, 3])}
    return capture(Attends(keep), example, DYNAMIC)


@pytest.mark.parametrize("name", SPELLINGS)
def test_lengths_are_found_in_every_spelling_and_are_ragged(name):
    graph = graph_of(SPELLINGS[name])
    (places,) = find_lengths(graph).values()
    assert places == sizes_of(value_of(graph.placeholders[0]))[1]
    made = make_inputs(graph, 8, 32, seed=0)["lengths"]
    assert made[0] == 32 and 1 <= int(made.min()) < int(made.max()) and made.shape == (8,)
    assert make_inputs(graph, 3, 32, seed=0, ragged=False)["lengths"].tolist() == [32] * 3


def test_an_id_for_each_row_is_no_length():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 16)

        def forward(self, x, kind):
            return x + self.table(kind)[:, None] * (kind[:, None] == torch.arange(x.shape[1]))[..., None]

    example = {"x": torch.randn(2, 7, 16), "kind": torch.tensor([4, 3])}
    graph = capture(Labelled(), example, {"x": {0: "batch", 1: "sequence"}, "kind": {0: "batch"}})
    assert find_lengths(graph) == {}
    assert make_inputs(graph, 64, 32, seed=0)["kind"].max() == 4


@pytest.mark.parametrize("target", ["edge", "ascend:910A"])
def test_a_model_that_takes_lengths_compiles(target, tmp_path):
    model = Attends(SPELLINGS["lt"])
    example = {"x": torch.randn(2, 7, 16), "lengths": torch.tensor([7, 3])}
    made = compile_pruned(model, target, example, None, None, tmp_path / "out", dynamic_shapes=DYNAMIC, measure=False)
    assert all(one.status != "failed" for one in made.verify())
