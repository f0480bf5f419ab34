"""What the targets for an NPU behind onnxruntime share: ONNX at static sizes, of ops that the execution provider runs.

The sizes are those of the caller's example inputs; where there are none, those that MACs are counted at (`at`: one row of
128 tokens), within what the model allows. All that depends on sizes alone is computed at compile time. The file runs in
onnxruntime on the CPU, where its numbers are checked; the device is not here, which a rung says. What the provider's
documentation lists is data: `provider_ops.toml`.
"""

from __future__ import annotations

import collections
import tomllib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxscript import optimizer

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.graph import Graph
from tilecut_passes.search import Lattice
from tilecut_runtime.manifest import DimRange, Manifest, Rung
from tilecut_runtime.reference import Arrays, Case
from tilecut_targets.check_onnx import check_onnx
from tilecut_targets.edge.contend import plain_session
from tilecut_targets.edge.expand_rotary import expand_rotary
from tilecut_targets.edge.measure_layers import sizes_at
from tilecut_targets.edge.runtime_target import RuntimeTarget
from tilecut_targets.edge.target import MODEL, count_ops
from tilecut_targets.target import Contenders, Written
from tilecut_targets.write_onnx import write_onnx

# Elements of a tensor that is computed at compile time: masks and buckets of lengths, not whole embeddings.
FOLDED = 1 << 22


@dataclass(frozen=True)
class DeviceProfile(RuntimeTarget):
    """An NPU that an execution provider of onnxruntime drives."""

    runtime = "onnxruntime"
    opset = 20

    @property
    @abstractmethod
    def decompose(self) -> dict[Any, Callable[..., Any]]:
        """op -> function in ops that the provider has."""

    @property
    def version(self) -> str:
        """Of the onnxruntime that stands for the device."""
        return f"onnxruntime {ort.__version__} on the CPU"

    def ranges(self, graph: Graph, at: Mapping[str, int]) -> dict[str, DimRange]:
        """Every size is one number."""
        sizes = sizes_at(graph, {**at, **graph.example_sizes})
        return {name: DimRange(n, n) for name, n in sizes.items()}

    def emit(self, lowered: Graph, folder: Path) -> tuple[dict[str, str], dict[str, int]]:
        """model.onnx at static sizes."""
        write_onnx(lowered, folder / MODEL, self.opset, self.decompose, finish=finish)
        return {"model": MODEL}, count_ops(folder / MODEL)

    def write(self, fused: Graph, lowered: Graph, folder: Path) -> Written:
        """The file, and how much of it the provider runs."""
        written = super().write(fused, lowered, folder)
        written.facts["sizes_from"] = "example_inputs" if lowered.example_sizes else "at, where MACs are counted"
        written.facts["outside_provider"] = outside(folder / MODEL, self.word)
        written.facts["provider_ops"] = provider(self.word)["source"]
        written.facts["cost_model"] = "none: the device is not here, and the CPU's times say nothing about it"
        return written

    def open_model(self, path: Path, threads: int) -> Callable[[Arrays], object]:
        """On the CPU, which stands for the device in numbers, not in time."""
        return plain_session(path, threads)

    def check(self, folder: Path) -> Rung:
        """The ONNX checker."""
        return check_onnx(folder, MODEL)

    def verify(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The checker, onnxruntime's CPU provider against the pruned torch model, and what was not run."""
        rungs = super().verify(folder, manifest, cases)
        held = provider(self.word)
        left = outside(folder / MODEL, self.word)
        nodes = sum(count_ops(folder / MODEL).values())
        said = "all" if not left else f"{nodes - sum(left.values())} of {nodes}"
        rest = "" if not left else ", the rest on the CPU: " + ", ".join(f"{op} {n}" for op, n in left.items())
        detail = f"needs {held['device']} with {held['run_with']}; by its documentation it runs {said} nodes{rest}"
        return [*rungs, Rung(f"{self.word} device", "not run", detail)]

    def contenders(
        self, dense: Graph, folder: Path, manifest: Manifest, threads: int, scratch: Path
    ) -> Contenders | None:
        """None: the device is not here."""
        return None

    def cost(
        self,
        dense: Graph,
        axes: Axes,
        groups: Sequence[Group],
        sets: Sequence[Sequence[str]],
        at: Mapping[str, int],
        lattice: Lattice,
        folder: Path | None,
        progress: Callable[[int, int], None],
    ) -> None:
        """None: milliseconds of this machine's CPU would not be the device's."""


@cache
def provider(word: str) -> dict[str, Any]:
    """What is known of an execution provider."""
    return tomllib.loads(Path(__file__).with_name("provider_ops.toml").read_text(encoding="utf-8"))[word]


def outside(path: Path, word: str) -> dict[str, int]:
    """The ops of an ONNX file that the provider's documentation does not list, with the number of nodes."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    known = set(provider(word)["ops"])
    left = collections.Counter(n.op_type for n in nodes if n.domain not in ("", "ai.onnx") or n.op_type not in known)
    return dict(left.most_common())


def finish(model: ir.Model) -> None:
    """Compute at compile time what depends on no input: at static sizes masks, positions and buckets do not."""
    expand_rotary(model)
    # Values that are chosen between are computed on both sides: the logarithm of a distance of 0.
    with np.errstate(all="ignore"):
        optimizer.optimize(model, input_size_limit=FOLDED, output_size_limit=FOLDED)
