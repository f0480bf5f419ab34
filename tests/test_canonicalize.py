"""One spelling for what export may spell in several ways."""

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
