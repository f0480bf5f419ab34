"""Run an edge artifact's `model.pte` in ExecuTorch's runtime, through its Python bindings.

The bindings take torch tensors. ExecuTorch has one pool of threads for the whole process: `threads` sets it for every
program that is open. A loaded method owns its memory, so that a lock keeps runs from different threads apart.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilecut_runtime.errors import ArtifactError, first_line
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.session import Runner, refused

EXTRA = "pip install 'tilecut[executorch]'"


def executorch_runner(folder: Path, manifest: Manifest, threads: int | None) -> Runner:
    """A runner over the artifact's program.

    Raises:
        ArtifactError: ExecuTorch is not installed, or cannot open the file, or it is missing or altered.
    """
    name = manifest.file_of(folder, "model")
    manifest.check_files(folder, [name])
    try:
        run = open_executorch(folder / name, [spec.name for spec in manifest.inputs], threads)
    except ModuleNotFoundError as e:
        raise ArtifactError(
            str(folder), f"an {manifest.target} artifact runs on executorch, which is not installed", fix=EXTRA
        ) from e
    # Its bindings raise RuntimeError, and others where the file is no program.
    except Exception as e:
        raise ArtifactError(str(folder / name), f"executorch cannot open it: {first_line(e)}") from e

    def guarded(arrays: dict[str, np.ndarray]) -> Sequence[Any]:
        try:
            return run(arrays)
        except Exception as e:
            raise refused("executorch", e) from e

    return guarded


def open_executorch(
    path: Path, inputs: Sequence[str], threads: int | None
) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """A program's `forward`: arrays by name in, its results in order out."""
    import torch

    with warnings.catch_warnings():
        # Its bindings call themselves experimental.
        warnings.simplefilter("ignore")
        from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    assert method is not None
    alone = threading.Lock()
    if threads is not None:
        set_threads(threads)

    # The method lives as long as its program, which is held here.
    def run(arrays: dict[str, np.ndarray], program: Any = program) -> list[np.ndarray]:
        # A copy: torch takes neither negative strides nor, without a warning, read-only memory.
        given = [torch.from_numpy(np.array(arrays[name], order="C")) for name in inputs]
        with alone:
            return [value.numpy().copy() for value in method.execute(given)]

    return run


def set_threads(threads: int) -> None:
    """Size ExecuTorch's pool of threads, which all programs of the process share."""
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool

    if _threadpool_get_thread_count() != threads:
        _unsafe_reset_threadpool(threads)
