"""Small graphs of several architectures, for the tests of layers and of what they cost."""

import functools

import torch
from torch import nn

from checks import TinyMlp, encoder_graph, randomise, tiny_bert
from tilecut_passes.capture import capture
from zoo import ZOO


class GatedFfn(nn.Module):
    """A gated FFN before a plain one; without a norm between them the hidden width can be cut too, and joins all."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.plain = TinyMlp(neurons=16, out=12)

    def forward(self, x):
        x = x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return self.plain(x)


@functools.lru_cache
def graph_of(name):
    """A captured model, of the zoo or of this file; copy it before changing it."""
    made = {
        "bert": lambda: capture(tiny_bert()),
        "encoder": encoder_graph,
        "mlp": lambda: capture(randomise(TinyMlp()), torch.randn(4, 12)),
        "gated": lambda: capture(randomise(GatedFfn()), torch.randn(4, 12)),
    }
    if name in made:
        return made[name]()
    built = ZOO[name].build()
    model, inputs = built if isinstance(built, tuple) else (built, None)
    return capture(randomise(model), inputs)
