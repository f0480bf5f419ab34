"""Tiny models to score: captured, with their batches, and units that die on request."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from checks import bert_graph, mlp_graph, randomise, text_batch
from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from zoo import GQA


class ConvNet(nn.Module):
    """Two convolutions and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(image)))).mean((2, 3)))


class SigmoidExperts(nn.Module):
    """Experts in fused tensors, each behind a sigmoid gate of its own, in three spellings."""

    def __init__(self, spelling: str):
        super().__init__()
        self.spelling = spelling
        self.inner, self.router, self.out = nn.Linear(8, 12), nn.Linear(12, 5), nn.Linear(12, 3)
        self.up, self.down = nn.Parameter(torch.empty(5, 12, 16)), nn.Parameter(torch.empty(5, 16, 12))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.inner(x) + attention_mask[..., None] * 0
        gates = torch.sigmoid(self.router(x))
        if self.spelling == "bmm":
            rows = x.reshape(1, -1, 12).expand(5, -1, -1)
            each = torch.bmm(F.gelu(torch.bmm(rows, self.up)), self.down)
            return self.out(x + (each * gates.reshape(-1, 5).t()[..., None]).sum(0).reshape(x.shape))
        hidden = F.gelu(torch.einsum("bsd,edi->bsei", x, self.up))
        if self.spelling == "einsum":
            each = torch.einsum("bsei,eid->bsed", hidden, self.down)
            return self.out(x + torch.einsum("bse,bsed->bsd", gates, each))
        return self.out(x + torch.einsum("bse,bsei,eid->bsd", gates, hidden, self.down))


def tiny_llama() -> Any:
    """Eight heads in four KV groups, two layers."""
    return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA)))


@functools.lru_cache(maxsize=8)
def scored(name: str) -> tuple[Graph, tuple[Group, ...]]:
    """A captured model and its groups that can be cut."""
    if name == "bert":
        graph = bert_graph()
    elif name == "llama":
        graph = capture(tiny_llama())
    elif name == "mlp":
        graph = mlp_graph()
    elif name == "conv":
        graph = capture(randomise(ConvNet()), torch.randn(4, 3, 9, 8))
    else:
        example = {"x": torch.randn(2, 7, 8), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
        graph = capture(randomise(SigmoidExperts(name)), example)
    wanted = ("heads", "kv_groups", "queries", "neurons", "experts")
    return graph, tuple(g for g in find_groups(infer(graph)) if g.kind in wanted)


def batches_of(name: str, graph: Graph, count: int = 4, labels: bool = True, rows: int = 4) -> list[Batch]:
    """Calibration batches, padded where the model knows padding."""
    made = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        batch: dict[str, Tensor] = text_batch(rows, 9, seed=i)
        shape: tuple[int, ...] = (rows, 9)
        if name == "llama":
            del batch["token_type_ids"]
        elif name == "mlp":
            batch, shape = {"x": torch.randn(rows, 12, generator=generator)}, (rows, 3)
        elif name == "conv":
            batch, shape = {"image": torch.randn(rows, 3, 9, 8, generator=generator)}, (rows, 4)
        elif name != "bert":
            x = torch.randn(rows, 9, 8, generator=generator)
            batch, shape = {"x": x, "attention_mask": batch["attention_mask"]}, (rows, 9, 3)
        if labels and name in ("bert", "llama"):
            batch["labels"] = torch.randint(0, 32, shape, generator=generator)
        elif labels:
            batch["labels"] = torch.randn(shape, generator=generator)
        made.append(batch)
    return check_batches(graph, made)


def kill(graph: Graph, group: Group, unit: int, side: str) -> None:
    """Zero what a unit owns in the weights that contract it ("outgoing"), or in all its others ("incoming")."""
    outgoing = {str(x.target) for sink in group.gates for x in sink.node.all_input_nodes if x.op == "get_attr"}
    for member in group.members:
        if (member.parameter in outgoing) == (side == "outgoing"):
            tensor = graph.tensor(member.parameter).detach().clone()
            part = tensor.narrow(member.dim, member.start, math.prod(member.view)).unflatten(member.dim, member.view)
            part.select(member.dim + member.axis, unit).zero_()
            graph.set_tensor(member.parameter, nn.Parameter(tensor))
