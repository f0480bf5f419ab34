"""Run an edge artifact's `model.pte` in ExecuTorch's runtime, through its Python bindings.

The bindings take torch tensors. ExecuTorch has one pool of threads for the whole process, which a loaded program keeps:
`threads` sets it where no program is open, and has to be the same for all that are open together. A loaded method owns
its memory, so that a lock keeps runs from different threads apart.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
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
    except ArtifactError:
        raise
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
    """A program's `forward`: arrays by name in, its results in order out.

    Raises:
        ArtifactError: another program is open with another number of threads.
    """
    with warnings.catch_warnings():
        # Its bindings call themselves experimental.
        warnings.simplefilter("ignore")
        from executorch.runtime import Runtime

    # A loaded program keeps the pool that it found.
    if threads is not None:
        _set_threads(path, threads)
    program = _Program(Runtime.get().load_program(path), inputs)
    _open.add(program)
    return program


class _Program:
    """A loaded program; its method lives as long as it does."""

    def __init__(self, program: Any, inputs: Sequence[str]):
        self.program, self.method, self.inputs = program, program.load_method("forward"), inputs
        self.alone = threading.Lock()
        assert self.method is not None

    def __call__(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        import torch

        # A copy: torch takes neither negative strides nor, without a warning, read-only memory.
        given = [torch.from_numpy(np.array(arrays[name], order="C")) for name in self.inputs]
        with self.alone:
            return [value.numpy().copy() for value in self.method.execute(given)]


# The programs that are in use, all of them on one pool of threads: without it they crash.
_open: weakref.WeakSet[_Program] = weakref.WeakSet()


def _set_threads(path: Path, threads: int) -> None:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool

    has = _threadpool_get_thread_count()
    if has == threads:
        return
    gc.collect()
    if _open:
        raise ArtifactError(
            str(path),
            "ExecuTorch has one pool of threads for a process, and other programs are open on it",
            got=f"threads={threads}",
            wanted=f"threads={has}",
            fix="close the others first, or open all with the same number",
        )
    _unsafe_reset_threadpool(threads)
