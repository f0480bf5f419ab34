"""What a user would run a model with instead of tilecut, each on the model as torch captures it, without our fusions.

A peer writes a graph into a folder, and `open_peers.py` opens what it wrote: one process can write, time and compare, and
another open the files to see how much memory that takes. All peers of a model share a folder: four of them start from
torch's ONNX export, which is written once.

What a peer needs is imported when it is used. One that is not installed, or that fails, says so in one line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import first_line
from tilecut_runtime.torch_program import save_program, tensors_of
from tilecut_targets.decompositions import DECOMPOSITIONS
from tilecut_targets.export_program import export_program
from tilecut_targets.open_peers import (
    EXECUTORCH_FILE,
    EXECUTORCH_NAMES,
    EXPORT_FILE,
    NAMES,
    ONNXSCRIPT_FILE,
    OPENERS,
    OPENVINO_FILE,
    OPENVINO_WEIGHTS,
    ORT_FILE,
    PROGRAM,
    WEIGHTS,
    Runner,
)
from tilecut_targets.unpack_attention import UnpackAttention
from tilecut_targets.write_onnx import EXTERNAL_DATA_BYTES, write_onnx

# What torch exports at when it is asked for nothing else is 20 too.
ONNX_OPSET = 20


@dataclass(frozen=True)
class Peer:
    """One way to run a model.

    Attributes:
        name: on the command line.
        title: in tables.
        package: what it runs on, as pip and Python call it.
        write: writes a graph into a folder.
        files: the names of what is opened, for their size; files that weights were split off into count too.
        bounded: it wants an upper bound for every dynamic size.
    """

    name: str
    title: str
    package: str
    write: Callable[[Graph, Path], None]
    files: tuple[str, ...]
    bounded: bool = False

    def open(self, folder: Path, threads: int) -> Runner:
        """What `write` wrote, for a number of threads."""
        return OPENERS[self.name](folder, threads)

    def bytes(self, folder: Path) -> int:
        """The size of the files that it opens."""
        held = [p for p in folder.iterdir() if any(p.name == f or p.name.startswith(f"{f}.") for f in self.files)]
        return sum(p.stat().st_size for p in held)

    def why(self, error: Exception) -> str:
        """One line for a peer that could not be made, or that failed."""
        if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] == self.package:
            return f"not installed: pip install {self.package}"
        return first_line(error)


def write_eager(graph: Graph, folder: Path) -> None:
    """The program as torch runs it, and its weights."""
    if (folder / PROGRAM).is_file():
        return
    program = export_program(graph)
    # Tied weights are one tensor, and safetensors wants them apart.
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors_of(program).items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / NAMES).write_text(json.dumps([graph.inputs, graph.outputs]), encoding="utf-8")
    save_program(program, folder / PROGRAM)


def write_export(graph: Graph, folder: Path) -> None:
    """torch's own ONNX export."""
    if (folder / EXPORT_FILE).is_file():
        return
    exported = graph.copy()
    run_passes(exported, [UnpackAttention()])
    # The model may call our ops itself, which torch has no ONNX form for.
    write_onnx(exported, folder / EXPORT_FILE, ONNX_OPSET, DECOMPOSITIONS)


def write_ort(graph: Graph, folder: Path) -> None:
    """torch's export after `onnxruntime.transformers.optimizer`."""
    write_export(graph, folder)
    optimize(folder / EXPORT_FILE, folder / ORT_FILE)


def optimize(source: Path, path: Path) -> None:
    """onnxruntime.transformers.optimizer with its BERT fusions; it finds head count and width itself."""
    from onnxruntime.transformers import optimizer

    with _quiet():
        optimizer.optimize_model(
            str(source), model_type="bert", num_heads=0, hidden_size=0, opt_level=0
        ).save_model_to_file(str(path), use_external_data_format=_is_split(source))


def write_onnxscript(graph: Graph, folder: Path) -> None:
    """torch's export after ONNX Script's fusions for onnxruntime."""
    write_export(graph, folder)
    optimize_for_ort(folder / EXPORT_FILE, folder / ONNXSCRIPT_FILE)


def optimize_for_ort(source: Path, path: Path) -> None:
    """onnxscript.rewriter.ort_fusions with its defaults."""
    import onnx_ir as ir
    from onnxscript.rewriter import ort_fusions

    with _quiet():
        made = ort_fusions.optimize_for_ort(ir.load(source))
    # Older versions return the model alone.
    model = made[0] if isinstance(made, tuple) else made
    ir.save(model, path, external_data=f"{path.name}.data" if _is_split(source) else None)


def _is_split(source: Path) -> bool:
    """Whether the weights are too large for one protobuf file."""
    beside = source.with_name(f"{source.name}.data")
    return beside.is_file() or source.stat().st_size > EXTERNAL_DATA_BYTES


def write_openvino(graph: Graph, folder: Path) -> None:
    """torch's export as OpenVINO's own form, weights in float32."""
    import openvino

    write_export(graph, folder)
    model = openvino.Core().read_model(str(folder / EXPORT_FILE))
    openvino.save_model(model, str(folder / OPENVINO_FILE), compress_to_fp16=False)


def write_executorch(graph: Graph, folder: Path) -> None:
    """An ExecuTorch program with what XNNPACK takes; every dynamic size must have an upper bound."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    unpacked = graph.copy()
    run_passes(unpacked, [UnpackAttention()])
    program = export_program(unpacked, positional=True)
    with _quiet():
        program = program.run_decompositions(dict(DECOMPOSITIONS))
        made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (folder / EXECUTORCH_NAMES).write_text(json.dumps([graph.inputs, graph.outputs]), encoding="utf-8")
    (folder / EXECUTORCH_FILE).write_bytes(made.buffer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The peers log and warn about what they do not fuse, and about packages that are not wanted here."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


EAGER = Peer("eager", "torch eager", "torch", write_eager, (PROGRAM, WEIGHTS))
COMPILED = Peer("compile", "torch.compile", "torch", write_eager, (PROGRAM, WEIGHTS))
EXPORT = Peer("export", "torch's export", "onnxruntime", write_export, (EXPORT_FILE,))
ORT = Peer("ort", "ORT's optimizer", "onnxruntime", write_ort, (ORT_FILE,))
ONNXSCRIPT = Peer("onnxscript", "ONNX Script's optimizer", "onnxscript", write_onnxscript, (ONNXSCRIPT_FILE,))
OPENVINO = Peer("openvino", "OpenVINO", "openvino", write_openvino, (OPENVINO_FILE, OPENVINO_WEIGHTS))
EXECUTORCH = Peer(
    "executorch", "ExecuTorch (XNNPACK)", "executorch", write_executorch, (EXECUTORCH_FILE,), bounded=True
)

PEERS = {peer.name: peer for peer in (EAGER, COMPILED, EXPORT, ORT, ONNXSCRIPT, OPENVINO, EXECUTORCH)}
