"""Run an edge artifact's `openvino_model.xml` in OpenVINO's CPU plugin.

Products are computed in float32: on a processor with bfloat16 units the plugin would choose those, and the numbers would
be others than those that the artifact was verified with. A compiled model has one request, so that a lock keeps runs
from different threads apart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tilecut_runtime.errors import ArtifactError, first_line
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.openvino_decoder import OpenVinoDecoder
from tilecut_runtime.session import Runner, refused

EXTRA = "pip install 'tilecut[openvino]'"


def openvino_runner(
    folder: Path, manifest: Manifest, threads: int | None
) -> tuple[Runner, OpenVinoDecoder | None]:
    """A runner over the artifact's model, and what decodes with it where it has a cache.

    Raises:
        ArtifactError: OpenVINO is not installed, or cannot open the file, or a file is missing or altered.
    """
    name = manifest.file_of(folder, "model")
    manifest.check_files(folder, [name, manifest.file_of(folder, "weights")])
    try:
        compiled = compile_openvino(folder / name, threads)
        run = runner_over(compiled)
    except ModuleNotFoundError as e:
        raise ArtifactError(
            str(folder), f"an {manifest.target} artifact runs on openvino, which is not installed", fix=EXTRA
        ) from e
    # OpenVINO's own exceptions are RuntimeErrors; a file that it cannot parse may give others.
    except Exception as e:
        raise ArtifactError(str(folder / name), f"openvino cannot open it: {first_line(e)}") from e
    wanted = [spec.name for spec in manifest.outputs]

    def guarded(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            out = run(arrays)
        except Exception as e:
            raise refused("openvino", e) from e
        return [out[name] for name in wanted]

    layout = manifest.generation
    return guarded, None if layout is None else OpenVinoDecoder(compiled, manifest, layout)


def open_openvino(path: Path, threads: int | None) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """A model file (IR or ONNX) on the CPU: arrays by name in, arrays by name out."""
    return runner_over(compile_openvino(path, threads))


def compile_openvino(path: Path, threads: int | None) -> Any:
    """A model file as the CPU plugin compiles it."""
    import openvino as ov

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return ov.Core().compile_model(str(path), "CPU", options)


def runner_over(compiled: Any) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Runs of a compiled model; one that holds a cache begins each with an empty one."""
    request, alone = compiled.create_infer_request(), threading.Lock()
    outputs = [(port.get_any_name(), port) for port in compiled.outputs]
    holds = bool(request.query_state())

    def run(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with alone:
            if holds:
                request.reset_state()
            found = request.infer(arrays)
            return {name: found[port].copy() for name, port in outputs}

    return run
