"""target="edge:portable": one ONNX file of standard ops alone (opset 23), for any runtime that keeps to the standard.

No vendor's domain and no model-local function occurs in it: the file is read again and refused if one does.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnxruntime as ort

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_runtime.errors import LoweringError
from tilecut_runtime.manifest import Rung
from tilecut_runtime.reference import Arrays
from tilecut_targets.check_onnx import check_onnx
from tilecut_targets.decompositions import DECOMPOSITIONS
from tilecut_targets.edge.contend import plain_session
from tilecut_targets.edge.expand_rotary import expand_rotary
from tilecut_targets.edge.lower_residual import LowerResidual
from tilecut_targets.edge.lower_standard_attention import LowerStandardAttention
from tilecut_targets.edge.onnx_ops import PORTABLE_OPSET
from tilecut_targets.edge.runtime_target import RuntimeTarget
from tilecut_targets.edge.target import MODEL
from tilecut_targets.unpack_attention import UnpackAttention
from tilecut_targets.write_onnx import write_onnx

STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class PortableTarget(RuntimeTarget):
    """Standard ONNX, run here by onnxruntime."""

    chip: str | None = "portable"
    word: ClassVar[str] = "portable"
    runtime = "onnxruntime"
    why: ClassVar[Mapping[str, str]] = {
        "attention": "opset 23 has Attention, as fast as the fused ops in onnxruntime; Softmax where it cannot say the rule",
        "norms": "LayerNormalization and RMSNormalization are standard; a Sum before the first keeps onnxruntime from fusing",
        "rotary": "RotaryEmbedding is standard from opset 23 on; torch's exporter no longer writes it at 24",
        "activations": "Gelu is standard from opset 20 on; a bias stays with its layer",
    }

    @property
    def version(self) -> str:
        """onnxruntime's, which stands for every runtime of the standard."""
        return f"onnxruntime {ort.__version__}"

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """Standard forms."""
        return (UnpackAttention(), LowerStandardAttention(), LowerResidual())

    def emit(self, lowered: Graph, folder: Path) -> tuple[dict[str, str], dict[str, int]]:
        """model.onnx.

        Raises:
            LoweringError: an op of the graph has no standard form.
        """
        model = write_onnx(lowered, folder / MODEL, PORTABLE_OPSET, DECOMPOSITIONS, finish=expand_rotary)
        check_standard(model)
        return {"model": MODEL}, collections.Counter(node.op_type for node in model.graph)

    def open_model(self, path: Path, threads: int) -> Callable[[Arrays], object]:
        """A plain session."""
        return plain_session(path, threads)

    def check(self, folder: Path) -> Rung:
        """The ONNX checker."""
        return check_onnx(folder, MODEL)


def check_standard(model: ir.Model) -> None:
    """Refuse a model with another domain than ONNX's own, or with functions of its own."""
    nodes = [node for graph in (model.graph, *model.functions.values()) for node in graph.all_nodes()]
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in nodes if n.domain not in STANDARD})
    foreign += [str(identifier) for identifier in model.functions]
    if foreign:
        raise LoweringError(
            "edge:portable",
            "the exporter wrote ops that are not standard ONNX",
            got=", ".join(foreign[:5]),
            fix='target="edge" has vendor ops',
        )
