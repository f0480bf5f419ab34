"""target="edge:ort-mobile": the edge target's file, and the same model in onnxruntime's own format, `model.ort`.

Builds of onnxruntime for phones are without the ONNX parser and the graph optimizer: a `.ort` file holds the graph as it
was after optimization. What is saved is what any CPU may run: layouts that depend on this machine's processor are left
out, and so is SkipLayerNormFusion, which is slower on CPUs. `required_operators.config` lists the ops that a reduced build
needs. The form: https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnxruntime as ort

from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_runtime.errors import LoweringError, first_line
from tilecut_runtime.manifest import Rung
from tilecut_runtime.reference import Arrays
from tilecut_targets.check_onnx import check_onnx
from tilecut_targets.edge.contend import plain_session
from tilecut_targets.edge.forms import Forms, write_forms
from tilecut_targets.edge.quantize_onnx import CALIBRATED, QUANTIZATIONS, quantize_onnx
from tilecut_targets.edge.runtime_target import RuntimeTarget
from tilecut_targets.edge.target import MODEL, WHY, EdgeTarget, count_ops

ORT_MODEL, OPERATORS = "model.ort", "required_operators.config"


@dataclass(frozen=True)
class OrtMobileTarget(RuntimeTarget):
    """onnxruntime's builds for phones."""

    chip: str | None = "ort-mobile"
    word: ClassVar[str] = "ort-mobile"
    runtime = "onnxruntime"
    # fp16 is weights that a cast widens when a file is loaded: in a .ort file they are wide already, or cast in every run.
    quantizations: ClassVar[Mapping[str, float]] = {how: lost for how, lost in QUANTIZATIONS.items() if how != "fp16"}
    calibrated: ClassVar[tuple[str, ...]] = CALIBRATED
    why: ClassVar[Mapping[str, str]] = {
        **WHY,
        "attention": "com.microsoft's fused ops of onnxruntime's CPU provider: one node a layer, QKV packed at compile time",
    }

    @property
    def version(self) -> str:
        """onnxruntime's."""
        return f"onnxruntime {ort.__version__}"

    @property
    def fusions(self) -> tuple[Pass, ...]:
        """The edge target's."""
        return EdgeTarget().fusions

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """The edge target's first forms."""
        return Forms().passes

    def emit(self, lowered: Graph, folder: Path) -> tuple[dict[str, str], dict[str, int]]:
        """model.onnx, and model.ort made of it."""
        write_forms(lowered, folder / MODEL, Forms())
        return {"model": ORT_MODEL, "onnx": MODEL, "operators": OPERATORS}, self._convert(folder)

    def quantize_files(self, folder: Path, batches: Sequence[Batch]) -> dict[str, object]:
        """model.onnx quantized as the edge target does, and model.ort made of it anew."""
        assert self.quantize is not None
        before = (folder / ORT_MODEL).stat().st_size
        record = quantize_onnx(folder / MODEL, self.quantize, batches)
        facts = self.facts(self._convert(folder))
        record["bytes"] = {"before": before, "after": (folder / ORT_MODEL).stat().st_size}
        return {**facts, "quantization": record}

    def _convert(self, folder: Path) -> dict[str, int]:
        """Make the other files of model.onnx; returns how many nodes of each op that holds."""
        convert_to_ort(folder / MODEL, folder / ORT_MODEL)
        write_operators(folder / ORT_MODEL, folder / OPERATORS)
        return count_ops(folder / MODEL)

    def open_model(self, path: Path, threads: int) -> Callable[[Arrays], object]:
        """A plain session."""
        return plain_session(path, threads)

    def check(self, folder: Path) -> Rung:
        """Of the ONNX file; the session reads the other one."""
        return check_onnx(folder, MODEL)


def convert_to_ort(source: Path, path: Path) -> None:
    """An ONNX file as onnxruntime's format, optimized as far as it holds on any CPU.

    Raises:
        LoweringError: onnxruntime cannot save it: its format ends at 2 GB.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # One level more would be layouts for the processor that converts.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    # onnxruntime's exception classes share no public base but Exception.
    try:
        ort.InferenceSession(
            str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
        )
    except Exception as e:
        raise LoweringError("convert_to_ort", f"onnxruntime cannot save {path.name}: {first_line(e)}") from e


def write_operators(model: Path, path: Path) -> None:
    """The ops that a build of onnxruntime must have to run a `.ort` file, as its build script reads them."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    # It logs where it wrote.
    logger = logging.getLogger("ort_format_model.utils")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        create_config_from_models([model], path, enable_type_reduction=False)
    finally:
        logger.setLevel(level)
    # The tool notes the file's path on this machine.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("#")) + "\n", encoding="utf-8")
