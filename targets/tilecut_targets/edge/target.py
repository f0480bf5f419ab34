"""target="edge": one ONNX file that is fast under a plain onnxruntime session with default options."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_passes.search import Lattice
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.manifest import Manifest, Rung
from tilecut_runtime.reference import Case
from tilecut_runtime.session import onnx_runner
from tilecut_targets.check_onnx import check_onnx
from tilecut_targets.cost_model import CostModel
from tilecut_targets.decompositions import DECOMPOSITIONS
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.contend import contend
from tilecut_targets.edge.describe_emission import describe_emission
from tilecut_targets.edge.lower_attention import LowerAttention
from tilecut_targets.edge.lower_bias_gelu import LowerBiasGelu
from tilecut_targets.edge.lower_residual import LowerResidual
from tilecut_targets.edge.measure_layers import measure_layers
from tilecut_targets.target import Contenders, Target, Written, count_attentions, rung
from tilecut_targets.unpack_attention import UnpackAttention
from tilecut_targets.write_onnx import write_onnx

MODEL = "model.onnx"
FUSED_ATTENTION = ("Attention", "MultiHeadAttention")
# Part of a transformer -> why it has the form that is emitted.
WHY = {
    "attention": "com.microsoft's fused ops of onnxruntime's CPU provider: one node a layer, QKV packed at compile time",
    "norms": "whole, and the residual before them spelled Sum: Add would become SkipLayerNormalization, slower on CPUs",
    "rotary": "as torch's exporter writes it at opset 20, which has no op for it",
    "activations": "the bias of the layer before goes into BiasGelu; the others as opset 20 has them",
}


@dataclass(frozen=True)
class EdgeTarget(Target):
    """onnxruntime on a CPU: latency follows MACs, multiples of 16 suffice, any number of heads."""

    name = "edge"
    runtime = "onnxruntime"
    block = 16
    tolerance = 1e-4

    def __post_init__(self) -> None:
        if self.chip is not None:
            raise ConfigError("target", "the edge target has no chips", got=f"edge:{self.chip}", wanted="'edge'")

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """Fused forms of onnxruntime's CPU provider."""
        return (UnpackAttention(), LowerAttention(), LowerResidual(), LowerBiasGelu())

    def write(self, fused: Graph, lowered: Graph, folder: Path) -> Written:
        """model.onnx at the folder's root."""
        write_onnx(lowered, folder / MODEL, ort_ops.ONNX_OPSET, DECOMPOSITIONS)
        counts = count_ops(folder / MODEL)
        fused_nodes = sum(counts[op] for op in FUSED_ATTENTION)
        return Written(
            {"model": MODEL},
            {
                "onnx_nodes": sum(counts.values()),
                "fused_attention": fused_nodes,
                "attention": count_attentions(fused),
                "onnx_ops": dict(counts.most_common()),
                "emits": describe_emission(counts, WHY),
            },
        )

    def verify(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The ONNX checker, then onnxruntime against the pruned torch model."""
        checked = check_onnx(folder, MODEL)
        run = onnx_runner(folder, manifest, "model", None)
        names = [spec.name for spec in manifest.outputs]
        error = max(case.error(dict(zip(names, run(case.inputs)))) for case in cases)
        sizes = ", ".join(case.size for case in cases)
        return [
            checked,
            rung(
                "artifact equals pruned model",
                error,
                self.tolerance,
                f"onnxruntime against torch on ragged inputs of {sizes}",
            ),
        ]

    def contenders(self, dense: Graph, folder: Path, manifest: Manifest, threads: int, scratch: Path) -> Contenders:
        """The dense model by this very path, as torch exports it, and after onnxruntime's own transformer optimizer."""
        return contend([*self.fusing, *self.lowering], dense, folder / MODEL, threads, scratch)

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
    ) -> CostModel:
        """Measured on this machine, one layer of each type at a time; see `measure_layers`."""
        return measure_layers(self, dense, axes, groups, sets, at, lattice, folder, progress)


def count_ops(path: Path) -> collections.Counter[str]:
    """How many nodes of each op an ONNX file holds."""
    return collections.Counter(n.op_type for n in onnx.load(str(path), load_external_data=False).graph.node)
