"""Small models with one kind of layer each, what refits are tested on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from checks import groups_of, randomise
from tilecut.config import DEFAULT_KINDS
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from zoo import GQA


class Gated(nn.Module):
    """A gated FFN on a residual."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Transposed(nn.Module):
    """Weights as [I, O], and read through a transpose: addmm, mm and x @ w.T."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(12, 20)), nn.Parameter(torch.empty(20))
        self.c, self.d = nn.Parameter(torch.empty(20, 16)), nn.Parameter(torch.empty(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(torch.addmm(self.b, x.reshape(-1, 12), self.a))
        return (torch.relu(rows @ self.c) @ self.d.T).view_as(x)


class Convolutions1d(nn.Module):
    """Like the stem of a speech model: strides, and a convolution of groups."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(12, 16, 3, padding=1), nn.Conv1d(16, 12, 4, stride=2, padding=1)
        self.third, self.fourth = nn.Conv1d(12, 18, 3, groups=3), nn.Conv1d(18, 6, 3, groups=3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x.transpose(1, 2)))))
        return self.fourth(torch.relu(self.third(x))).transpose(1, 2)


class Convolutions2d(nn.Module):
    """Two convolutions over an image of one channel."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 5, (3, 2), stride=(2, 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x[:, None])))


class Experts(nn.Module):
    """Top-1 experts whose rows are sorted; the router reads what nothing cuts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(12, 3)
        self.up, self.down = nn.Parameter(torch.empty(3, 12, 10)), nn.Parameter(torch.empty(3, 12, 10))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 12)
        expert, order = self.router(rows).argmax(-1).sort()
        ends = (expert[:, None] <= torch.arange(3)).sum(0).to(torch.int32)
        inner = torch.relu(torch.ops.tilecut.grouped_matmul(rows[order], self.up, ends))
        out = torch.ops.tilecut.grouped_matmul(inner, self.down.transpose(1, 2), ends)
        return out[order.argsort()].view_as(x)


class DenseExperts(nn.Module):
    """Every expert on every row, added up."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(3, 12, 10)), nn.Parameter(torch.empty(3, 10, 12))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 12).expand(3, -1, -1)
        return torch.bmm(torch.relu(torch.bmm(rows, self.up)), self.down).sum(0).view_as(x)


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "gated": Gated,
    "transposed": Transposed,
    "conv1d": Convolutions1d,
    "conv2d": Convolutions2d,
    "experts": Experts,
    "dense experts": DenseExperts,
}


def plain_inputs(seed: int, batch: int = 16) -> dict[str, Tensor]:
    """What the models of `PLAIN` take: rows that lie near a plane, so that units are redundant."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    x = torch.randn(batch, 15, 4, generator=generator) @ mix
    return {"x": x + 0.1 * torch.randn(batch, 15, 12, generator=generator)}


@functools.cache
def plain_graph(name: str) -> Graph:
    """A captured model of `PLAIN`; copy it before changing it."""
    return capture(randomise(PLAIN[name]()), plain_inputs(0, 2))


@functools.cache
def llama_graph() -> Graph:
    """A captured LLaMA with 4 KV groups of 2 queries and a gated FFN; copy it before changing it."""
    return capture(randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA))))


@functools.cache
def mixtral_graph() -> Graph:
    """A captured Mixtral of 4 experts, top 2; copy it before changing it."""
    return capture(randomise(transformers.MixtralForCausalLM(transformers.MixtralConfig(**GQA, num_local_experts=4))))


def half(graph: Graph, *kinds: str) -> PrunePlan:
    """The plan that keeps the first half of every group."""
    groups = groups_of(graph, *(kinds or DEFAULT_KINDS))
    return PrunePlan.keep_all(graph, groups).keeping({g.name: range(-(-g.size // 2)) for g in groups})


def cut_by(graph: Graph, plan: PrunePlan) -> Graph:
    """A pruned copy."""
    cut = graph.copy()
    run_passes(cut, [Prune(plan)])
    return cut


def distance(dense: Graph, other: Graph, inputs: dict[str, Any]) -> float:
    """How far the first output is from the dense one, relative to it; padding does not count."""
    name = dense.outputs[0]
    want, got = dense.run(inputs)[name], other.run(inputs)[name]
    real = inputs.get("attention_mask", torch.ones(want.shape[:1])) != 0
    return float((got - want)[real].norm() / want[real].norm())
