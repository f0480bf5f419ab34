"""Run an artifact of a torch program: the native package where one fits, else the program with the kernels it carries.

On a CUDA device, in this order:
    1. the package that `tilecut build` made for this architecture and this version of torch;
    2. the exported program, whose attention launches the artifact's cubins where they fit, and kernels that triton
       compiles at their first launch where they do not.
`Session.how` says which it was, and why a cubin or a package was not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.native_package import open_native
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

    def run(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            # A copy: torch takes neither negative strides nor, without a warning, read-only memory.
            given = {k: torch.from_numpy(v.copy()).to(device) for k, v in arrays.items()}
            try:
                out = program(**given)
            except (IndexError, RuntimeError) as e:
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


def architecture_of(device: str) -> str:
    """ "cpu", "sm_90": what a native package is built for."""
    if torch.device(device).type == "cpu":
        return "cpu"
    # Imports triton.
    from tilecut_runtime.launch_attention import architecture

    return architecture(torch.device(device))


def _open(folder: Path, manifest: Manifest, device: str) -> tuple[Program, str]:
    arch = architecture_of(device)
    package, why_not = open_native(folder, manifest, arch)
    if package is not None:
        return package, f"native package for {arch}"
    notes = [why_not] if why_not else []
    if arch == "cpu":
        how = "exported program on the CPU"
    else:
        from tilecut_runtime.load_cubins import load_cubins

        with torch.cuda.device(device):
            loaded = load_cubins(folder, manifest, arch)
        how = f"exported program, {loaded.count} precompiled kernels"
        notes += [loaded.reason] if loaded.reason else []
    return open_program(folder, manifest, "model", device), "; ".join([how, *notes])


def _is_device(name: str) -> bool:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        return False
    return device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
