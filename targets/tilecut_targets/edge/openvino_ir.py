"""target="edge:openvino": OpenVINO's own form, `openvino_model.xml` with the weights in `openvino_model.bin`.

The graph goes through ONNX with attention as MatMul and Softmax: on CPUs OpenVINO runs that faster than its
ScaledDotProductAttention. The names are those that optimum-intel and sentence-transformers look for. Weights stay float32
unless the target is quantized: then the ONNX file is rewritten by the code that writes the edge target's (the same
integers), and OpenVINO's frontend makes of it
    int8            weights int8 a column, which the plugin multiplies with activations that it rounds in the run
    int8-static     FakeQuantize with ranges from calibration
    int4, int4:128  weights of 4 bits with a scale and a zero point a block; activations as for int8
    fp16            weights stored in 16 bits, the form that OpenVINO's own tools write
A model that generates holds its cache itself: the inputs past_key_values.* and the outputs present.* become variables of the
model, empty until the first step (`hold_caches`).
How activations are rounded stands in the file's runtime options, so that any OpenVINO opens it alike.
"""

from __future__ import annotations

import collections
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tilecut_passes.add_cache import AddCache
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.grow_cache import GrowCache
from tilecut_passes.run_passes import Pass
from tilecut_runtime.cache_layout import BEAMS, is_past, present_of
from tilecut_runtime.errors import ArtifactError, LoweringError, first_line
from tilecut_runtime.manifest import Rung
from tilecut_runtime.openvino_runner import open_openvino
from tilecut_runtime.reference import Arrays
from tilecut_targets.decompositions import DECOMPOSITIONS
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.quantize_onnx import CALIBRATED, QUANTIZATIONS, quantize_onnx
from tilecut_targets.edge.runtime_target import RuntimeTarget
from tilecut_targets.write_onnx import write_onnx

if TYPE_CHECKING:
    import openvino as ov

IR, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
# What is no computation.
ENDS = ("Parameter", "Constant", "Result")
# What `quantize_files` starts from, and removes.
SOURCE = "float32.onnx"
# The plugin rounds activations in groups of so many channels that share a scale. Its own 32 took 1.2 times as long with int8
# weights and lost little less; a group may not be larger than a block of 4-bit weights.
ROUNDED_TOGETHER = {"int8": 128, "int4": 32, "int4:128": 128}
GROUP = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]


@dataclass(frozen=True)
class OpenVinoTarget(RuntimeTarget):
    """OpenVINO's CPU plugin."""

    chip: str | None = "openvino"
    word: ClassVar[str] = "openvino"
    runtime = "openvino"
    quantizations: ClassVar[Mapping[str, float]] = QUANTIZATIONS
    calibrated: ClassVar[tuple[str, ...]] = CALIBRATED
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

    def caching(self, max_length: int | None = None) -> tuple[Pass, ...]:
        """A cache that grows, which becomes the model's own state."""
        return (AddCache(max_length), GrowCache())

    def emit(self, lowered: Graph, folder: Path) -> tuple[dict[str, str], dict[str, int]]:
        """The IR, in float32.

        Raises:
            LoweringError: an op has no ONNX form, or OpenVINO has none for it.
        """
        # Not in `folder`: OpenVINO takes a path with a comma for several.
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / SOURCE
            write_onnx(lowered, source, ort_ops.ONNX_OPSET, DECOMPOSITIONS)
            counts = convert(source, folder / IR)
            if self.quantize is not None:
                _move(source, folder)
        return {"model": IR, "weights": WEIGHTS}, counts

    def quantize_files(self, folder: Path, batches: Sequence[Batch]) -> dict[str, object]:
        """The IR anew, from the ONNX file quantized."""
        assert self.quantize is not None
        before = _bytes(folder)
        with tempfile.TemporaryDirectory() as scratch:
            source = _move(folder / SOURCE, Path(scratch))
            if self.quantize == "fp16":
                counts = convert(source, folder / IR, compress=True)
                record: dict[str, object] = {"how": self.quantize, "weights": _halves(folder / IR), "kept": []}
            else:
                record = quantize_onnx(source, self.quantize, batches, runtime_rounds=True)
                counts = convert(source, folder / IR, group=ROUNDED_TOGETHER.get(self.quantize))
        record["bytes"] = {"before": before, "after": _bytes(folder)}
        return {**self.facts(counts), "quantization": record}

    def open_model(self, path: Path, threads: int) -> Callable[[Arrays], object]:
        """As our session opens it."""
        return open_openvino(path, threads)

    def check(self, folder: Path) -> Rung:
        """OpenVINO reads the IR back; unless it is quantized its weights are float32."""
        import openvino as ov

        try:
            model = ov.Core().read_model(folder / IR)
        except Exception as e:
            raise ArtifactError(str(folder / IR), f"no IR ({first_line(e)})", fix="compile it again") from e
        types = {op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"}
        status = "failed" if self.quantize is None and types & {"f16", "bf16"} else "passed"
        return Rung("openvino IR", status, f"{IR} is read back; constants are {', '.join(sorted(types))}")


def convert(source: Path, path: Path, compress: bool = False, group: int | None = None) -> dict[str, int]:
    """An ONNX file as IR; returns how many nodes of each op it holds.

    Args:
        compress: store float32 weights in 16 bits.
        group: how many channels the plugin is to round together; None leaves it to itself.

    Raises:
        LoweringError: OpenVINO has no form for an op.
    """
    import openvino as ov

    # Its frontends raise RuntimeErrors and classes of their own.
    try:
        model = ov.convert_model(source)
    except Exception as e:
        raise LoweringError("edge:openvino", f"openvino cannot convert the model: {first_line(e)}") from e
    hold_caches(model)
    if group is not None:
        model.set_rt_info(str(group), GROUP)
    try:
        ov.save_model(model, path, compress_to_fp16=compress)
    except RuntimeError as e:
        raise LoweringError("edge:openvino", f"openvino cannot write {path}: {first_line(e)}") from e
    counts = collections.Counter(op.get_type_name() for op in model.get_ops())
    return {op: n for op, n in counts.items() if op not in ENDS}


def hold_caches(model: ov.Model) -> int:
    """Make variables of a model's caches, in place; returns how many. A model without a cache is left as it is.

    A variable begins with no column, for as many rows as there are tokens' rows.
    """
    from openvino import opset13 as ops
    from openvino import passes

    known = {name for port in model.inputs for name in port.get_names()}
    pasts = [name for name in known if is_past(name)]
    if not pasts:
        return 0
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful({name: present_of(name) for name in pasts}))
    manager.run_passes(model)
    rows = model.input(BEAMS)
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue":
            _, heads, _, width = op.get_output_partial_shape(0)
            batch = ops.shape_of(rows, output_type="i64")
            rest = ops.constant(np.array([heads.get_length(), 0, width.get_length()], np.int64))
            shape = ops.concat([batch, rest], 0)
            nothing = ops.constant(0.0, dtype=op.get_output_element_type(0))
            op.set_arguments([ops.broadcast(nothing, shape).output(0)])
    model.validate_nodes_and_infer_types()
    return len(pasts)


def _move(source: Path, folder: Path) -> Path:
    """An ONNX file and the weights beside it, in another folder."""
    for part in list(source.parent.glob(f"{source.name}*")):
        shutil.move(part, folder / part.name)
    return folder / source.name


def _halves(path: Path) -> int:
    """How many weights an IR stores in 16 bits."""
    import openvino as ov

    constants = [op for op in ov.Core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
    return sum(op.get_element_type().get_type_name() == "f16" for op in constants)


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (IR, WEIGHTS))
