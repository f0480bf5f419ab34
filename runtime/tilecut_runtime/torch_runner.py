"""Run an artifact of a torch program: the native package where one fits, else the program with the kernels it carries.

On a CUDA device, in this order: the package that `tilecut build` made for this architecture and this version of torch; the
exported program. Attention launches the artifact's cubins where they fit, and kernels that triton compiles at their
first launch where they do not.
`Session.how` says which it was, and why a cubin or a package was not taken.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.kernels.choose_tile import known_arch
from tilecut_runtime.load_cubins import load_cubins
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.native_package import on_device, open_native
from tilecut_runtime.session import Runner, refused
from tilecut_runtime.torch_program import open_program

Program = Callable[..., Mapping[str, torch.Tensor]]


def torch_runner(folder: Path, manifest: Manifest, device: str | None, threads: int | None) -> tuple[Runner, str, str]:
    """(runner, device, what runs).

    Raises:
        ArtifactError: no such device here, or a file is missing, damaged or altered.
    """
    device = check_device(folder, device)
    if threads is not None:
        torch.set_num_threads(threads)
    program, how = _open(folder, manifest, device)
    # A native package waits for its only runner while it holds what attention needs to run: one call at a time.
    alone = threading.Lock() if how.startswith("native") else contextlib.nullcontext()
    # Triton's own errors: a tile that does not fit the device, a kernel that does not compile.
    failures = (IndexError, RuntimeError, *_triton_errors(device))

    def run(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad(), on_device(device), alone:
            # A copy: torch takes neither negative strides nor, without a warning, read-only memory.
            given = {k: torch.from_numpy(v.copy()).to(device) for k, v in arrays.items()}
            try:
                out = program(**given)
            except failures as e:
                raise refused("torch", e) from e
        return [out[spec.name].cpu().numpy() for spec in manifest.outputs]

    return run, device, how


def check_device(folder: Path, device: str | None) -> str:
    """The device to use, "cuda" where none is asked for.

    Raises:
        ArtifactError: it is not on this machine.
    """
    if device is None and not torch.cuda.is_available():
        raise ArtifactError(
            str(folder),
            "no CUDA device on this machine",
            fix='load it with device="cpu" to run the ops\' reference implementations',
        )
    device = device or "cuda"
    if not _is_device(device):
        raise ArtifactError(
            str(folder),
            "no such device on this machine",
            got=f"device={device!r}",
            wanted=f"None, 'cpu' or 'cuda' ({torch.cuda.device_count()} CUDA devices here)",
        )
    return device


def architecture_of(folder: Path, device: str) -> str:
    """ "cpu", "sm_90": what a native package is built for.

    Raises:
        ArtifactError: no triton for the GPU, or a GPU that the kernels have no tiles for.
    """
    if torch.device(device).type == "cpu":
        return "cpu"
    try:
        from tilecut_runtime.launch_attention import architecture
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        raise ArtifactError(
            str(folder), "its attention runs on triton, which is not installed", fix="pip install 'tilecut[cuda]'"
        ) from e
    arch = architecture(torch.device(device))
    try:
        known_arch(arch)
    except KeyError as e:
        raise ArtifactError(str(folder), f"the attention kernels do not run on this GPU: {e.args[0]}") from e
    return arch


def _open(folder: Path, manifest: Manifest, device: str) -> tuple[Program, str]:
    arch = architecture_of(folder, device)
    how, notes = "", []
    if arch != "cpu":
        with on_device(device):
            loaded = load_cubins(folder, manifest, arch)
        how, notes = f", {loaded.count} precompiled kernels", [loaded.reason] if loaded.reason else []
    package, why_not = open_native(folder, manifest, arch, device)
    if package is not None:
        return package, "; ".join([f"native package for {arch}{how}", *notes])
    notes += [why_not] if why_not else []
    return open_program(folder, manifest, "model", device), "; ".join([f"exported program{how}", *notes])


def _triton_errors(device: str) -> tuple[type[Exception], ...]:
    if torch.device(device).type == "cpu":
        return ()
    from triton import TritonError

    return (TritonError,)


def _is_device(name: str) -> bool:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        return False
    return name == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
