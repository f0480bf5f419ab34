"""target="edge:openvino": OpenVINO's own form, `openvino_model.xml` with the weights in `openvino_model.bin`.

The graph goes through ONNX with attention as MatMul and Softmax: on CPUs OpenVINO runs that faster than its
ScaledDotProductAttention. The names are those that optimum-intel and sentence-transformers look for. Weights stay float32.
"""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tilecut_passes.graph import Graph
from tilecut_runtime.errors import ArtifactError, LoweringError, first_line
from tilecut_runtime.manifest import Rung
from tilecut_runtime.openvino_runner import open_openvino
from tilecut_runtime.reference import Arrays
from tilecut_targets.decompositions import DECOMPOSITIONS
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.runtime_target import RuntimeTarget
from tilecut_targets.write_onnx import write_onnx

IR, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
# What is no computation.
ENDS = ("Parameter", "Constant", "Result")


@dataclass(frozen=True)
class OpenVinoTarget(RuntimeTarget):
    """OpenVINO's CPU plugin."""

    chip: str | None = "openvino"
    word: ClassVar[str] = "openvino"
    runtime = "openvino"
    why: ClassVar[Mapping[str, str]] = {
        "attention": "MatMul and Softmax: OpenVINO's ScaledDotProductAttention is slower on CPUs",
        "norms": "MVN is OpenVINO's layer norm; it finds RMS norms in their simpler ops by itself when it opens the file",
        "rotary": "in simpler ops, in which OpenVINO finds it by itself when it opens the file",
        "activations": "OpenVINO's own ops; it fuses bias and activation into products when it opens the file",
    }

    @property
    def version(self) -> str:
        """OpenVINO's."""
        import openvino

        return f"openvino {openvino.__version__.partition('-')[0]}"

    def emit(self, lowered: Graph, folder: Path) -> tuple[dict[str, str], dict[str, int]]:
        """The IR.

        Raises:
            LoweringError: an op has no ONNX form, or OpenVINO has none for it.
        """
        import openvino as ov

        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "model.onnx"
            write_onnx(lowered, source, ort_ops.ONNX_OPSET, DECOMPOSITIONS)
            # Its frontends raise RuntimeErrors and classes of their own.
            try:
                model = ov.convert_model(source)
            except Exception as e:
                raise LoweringError("edge:openvino", f"openvino cannot convert the model: {first_line(e)}") from e
            ov.save_model(model, folder / IR, compress_to_fp16=False)
        counts = collections.Counter(op.get_type_name() for op in model.get_ops())
        return {"model": IR, "weights": WEIGHTS}, {op: n for op, n in counts.items() if op not in ENDS}

    def open_model(self, path: Path, threads: int) -> Callable[[Arrays], object]:
        """As our session opens it."""
        return open_openvino(path, threads)

    def check(self, folder: Path) -> Rung:
        """OpenVINO reads the IR back, and its weights are float32."""
        import openvino as ov

        try:
            model = ov.Core().read_model(folder / IR)
        except Exception as e:
            raise ArtifactError(str(folder / IR), f"no IR ({first_line(e)})", fix="compile it again") from e
        types = {op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"}
        status = "failed" if types & {"f16", "bf16"} else "passed"
        return Rung("openvino IR", status, f"{IR} is read back; constants are {', '.join(sorted(types))}")
