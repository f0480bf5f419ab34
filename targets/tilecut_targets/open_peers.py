"""Open the files of a peer: what a user would run a model with instead of tilecut. What writes them is in `peers.py`.

Every runner takes arrays by input name and returns the outputs by name. Each imports its own runtime when it is called, and
no other, so that the memory it takes can be measured in a process that holds nothing else. Numbers stay float32: OpenVINO
would choose bfloat16 where the processor has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilecut_runtime.reference import Arrays

PROGRAM, WEIGHTS, NAMES = "torch.pt2", "torch.safetensors", "torch.json"
EXPORT_FILE, ORT_FILE, ONNXSCRIPT_FILE = "exported.onnx", "optimized.onnx", "onnxscript.onnx"
OPENVINO_FILE, OPENVINO_WEIGHTS = "openvino.xml", "openvino.bin"
EXECUTORCH_FILE, EXECUTORCH_NAMES = "executorch.pte", "executorch.json"

Runner = Callable[[Arrays], Arrays]


def open_eager(folder: Path, threads: int) -> Runner:
    """The captured graph in torch, op by op."""
    module, inputs, outputs = _open_module(folder, threads)
    return _torch_runner(module, inputs, outputs)


def open_compiled(folder: Path, threads: int) -> Runner:
    """`torch.compile` with its default compiler, for every shape anew: the fastest form that it has."""
    import torch

    module, inputs, outputs = _open_module(folder, threads)
    # What is compiled for one number of threads is not to be taken from torch's cache for another.
    made = torch.compile(module, dynamic=False, fullgraph=True, options={"cpp.threads": threads})
    run = _torch_runner(made, inputs, outputs)
    seen: set[tuple[tuple[int, ...], ...]] = set()

    def compile_new_shapes(arrays: Arrays) -> Arrays:
        shapes = tuple(array.shape for array in arrays.values())
        if shapes in seen:
            return run(arrays)
        # Beyond eight shapes torch would refuse to compile another.
        with torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16):
            made = run(arrays)
        seen.add(shapes)
        return made

    return compile_new_shapes


def _open_module(folder: Path, threads: int) -> tuple[Callable[..., Any], list[str], list[str]]:
    import torch

    from tilecut_passes.unlift_program import unlift_program
    from tilecut_runtime.torch_program import read_program

    torch.set_num_threads(threads)
    inputs, outputs = json.loads((folder / NAMES).read_text(encoding="utf-8"))
    return unlift_program(read_program(folder / PROGRAM, folder / WEIGHTS), "the model").module, inputs, outputs


def _torch_runner(module: Callable[..., Any], inputs: list[str], outputs: list[str]) -> Runner:
    import torch

    def run(arrays: Arrays) -> Arrays:
        with torch.inference_mode():
            values = module(*(torch.from_numpy(arrays[name]) for name in inputs))
        return {name: value.numpy() for name, value in zip(outputs, values, strict=True)}

    return run


def onnx_opener(name: str) -> Callable[[Path, int], Runner]:
    """What opens an ONNX file of that name in onnxruntime."""

    def open_file(folder: Path, threads: int) -> Runner:
        session = open_session(folder / name, threads)
        names = [o.name for o in session.get_outputs()]
        return lambda arrays: dict(zip(names, session.run(names, arrays), strict=True))  # type: ignore[arg-type]

    return open_file


def open_session(path: Path, threads: int) -> Any:
    """A session as a user would open it, but for the thread count and for threads that rest between runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # By default idle threads go on spinning after a run, on the cores that the next session in turn is timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_openvino(folder: Path, threads: int) -> Runner:
    """OpenVINO's CPU plugin, tuned for latency."""
    from tilecut_runtime import openvino_runner

    return openvino_runner.open_openvino(folder / OPENVINO_FILE, threads)


def open_executorch(folder: Path, threads: int) -> Runner:
    """ExecuTorch's Python bindings; one pool of threads serves all programs of the process."""
    from tilecut_runtime import executorch_runner

    inputs, outputs = json.loads((folder / EXECUTORCH_NAMES).read_text(encoding="utf-8"))
    run = executorch_runner.open_executorch(folder / EXECUTORCH_FILE, inputs, threads)
    return lambda arrays: dict(zip(outputs, run(arrays), strict=True))


OPENERS: dict[str, Callable[[Path, int], Runner]] = {
    "eager": open_eager,
    "compile": open_compiled,
    "export": onnx_opener(EXPORT_FILE),
    "ort": onnx_opener(ORT_FILE),
    "onnxscript": onnx_opener(ONNXSCRIPT_FILE),
    "openvino": open_openvino,
    "executorch": open_executorch,
}
