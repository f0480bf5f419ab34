"""One spelling for what export may spell in several ways."""

import pytest
import torch
from torch import nn

from checks import bert_graph, op_names, randomise
from tilecut_passes.canonicalize import Canonicalize
from tilecut_passes.capture import capture


class Fussy(nn.Module):
    """Clones, casts to its own dtype, views, dropout, whole slices, and an attention without a scale."""

    def __init__(self):
        super().__init__()
        self.qkv, self.dropout = nn.Linear(8, 24), nn.Dropout(0.3)

    def forward(self, x):
        q, k, v = (
            self.dropout(self.qkv(x.clone().to(torch.float32)))[:, :]
            .contiguous()
            .view(*x.shape[:2], 3, 2, 4)
            .permute(2, 0, 3, 1, 4)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).detach()


def test_what_means_nothing_is_gone():
    graph = capture(randomise(Fussy()), torch.randn(2, 5, 8))
    assert op_names(graph) == (
        "sym_size sym_size linear reshape permute unbind getitem getitem getitem scaled_dot_product_attention transpose reshape"
    ) or not {"clone", "dropout", "view", "slice", "contiguous", "detach", "to"} & set(op_names(graph).split())
    (node,) = [n for n in graph.nodes if "scaled_dot" in str(n.target)]
    assert node.kwargs["scale"] == 0.5


def test_numbers_stay():
    model = randomise(Fussy())
    x = torch.randn(3, 6, 8)
    assert torch.allclose(capture(model, torch.randn(2, 5, 8)).run({"x": x})["output"], model(x), atol=1e-6)


def test_idempotent():
    assert Canonicalize()(bert_graph()) == 0


class Picks(nn.Module):
    """Indexes a dimension with constants: a run of places, and places apart."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def forward(self, x):
        return x[:, :, self.places] * 2


@pytest.mark.parametrize(
    ("places", "op"), [([-2], "slice"), ([1, 2, 3], "slice"), ([-1, 0], "index"), ([0, 2], "index"), ([2, 1], "index")]
)
def test_a_run_of_constant_places_is_a_slice(places, op):
    graph = capture(Picks(places), torch.randn(2, 3, 5))
    assert op in op_names(graph).split()
    x = torch.randn(4, 2, 5)
    assert torch.equal(graph.run({"x": x})["output"], x[:, :, places] * 2)


@pytest.mark.parametrize(("low", "bins", "is_counting"), [(0, 4, True), (0, 3, False), (1, 4, False)])
def test_only_a_count_of_integers_is_a_sum(low, bins, is_counting):
    class Counts(nn.Module):
        def forward(self, x):
            return torch.histc(x.float(), bins=bins, min=low, max=3)

    graph = capture(Counts(), {"x": torch.tensor([0, 1, 3, 3, 2])})
    assert ("histc" not in op_names(graph)) == is_counting
    x = torch.randint(0, 4, (31,))
    assert torch.equal(graph.run({"x": x})["output"], torch.histc(x.float(), bins=bins, min=low, max=3))
