"""Give triton the kernels that an artifact carries, so that launches which they were made for compile nothing.

An artifact for CUDA holds cubins and `kernels/kernels.json`, which says of each the architecture, the launch that it is
for, its tile, shared memory, registers and spills. A cubin is taken when the device's architecture, triton's version and
the source of the kernel are those that it was made with; any other launch is compiled by triton as ever.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import Manifest, read_json

KERNELS = "kernels/kernels.json"


@dataclass(frozen=True)
class Cubin:
    """One entry of kernels.json.

    file: relative to the artifact; what triton's launcher reads of it lies beside it, as .json. launch: triton's
    specialization data, which name the types of the arguments, the constants and the options. source: a hash of the
    kernel's source.
    """

    file: str
    kernel: str
    arch: str
    source: str
    tile: list[int]
    dtype: str
    width: int
    value_width: int
    shared_bytes: int
    registers: int
    spills: int
    launch: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """How many cubins triton took, and why it took no more (empty where it took all of the architecture's)."""

    count: int
    reason: str = ""


def write_kernels(cubins: list[Cubin], triton_version: str, folder: Path) -> None:
    """Write kernels.json; the cubins' own files are there already."""
    held = {"triton": triton_version, "cubins": [asdict(one) for one in cubins]}
    (folder / KERNELS).parent.mkdir(parents=True, exist_ok=True)
    (folder / KERNELS).write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def read_kernels(folder: Path, manifest: Manifest) -> tuple[str, list[Cubin]]:
    """(triton's version, the cubins) of an artifact; their hashes are checked by whoever takes them.

    Raises:
        ArtifactError: kernels.json is damaged.
    """
    manifest.check_files(folder, [KERNELS])
    held = read_json(folder / KERNELS)
    try:
        cubins = [Cubin(**one) for one in held["cubins"]]
        for one in cubins:
            _check(one)
        return str(held["triton"]), cubins
    except (KeyError, TypeError, ValueError) as e:
        raise ArtifactError(
            str(folder / KERNELS), f"malformed list of kernels ({e})", fix="compile the model again"
        ) from e


def _check(cubin: Cubin) -> None:
    """Raise ValueError where an entry cannot be what a compile wrote."""
    texts = (cubin.file, cubin.kernel, cubin.arch, cubin.source, cubin.dtype)
    numbers = (cubin.shared_bytes, cubin.registers, cubin.spills, cubin.width, cubin.value_width)
    if not all(isinstance(x, str) for x in texts) or not all(type(x) is int for x in numbers):
        raise ValueError(f"{cubin.file}: an entry of another type")
    if not re.fullmatch(r"sm_\d+", cubin.arch) or not isinstance(cubin.launch, dict) or "key" not in cubin.launch:
        raise ValueError(f"{cubin.file}: {cubin.arch} and a launch")


def load_cubins(folder: Path, manifest: Manifest, arch: str) -> Loaded:
    """Hand the artifact's cubins for "sm_XX" to triton, for the current device.

    Raises:
        ArtifactError: kernels.json or a cubin is damaged.
    """
    if KERNELS not in manifest.files:
        return Loaded(0, "the artifact carries none")
    import triton

    version, cubins = read_kernels(folder, manifest)
    cubins = [one for one in cubins if one.arch == arch]
    if not cubins:
        return Loaded(0, f"the artifact carries none for {arch}")
    if version != triton.__version__:
        return Loaded(0, f"they were made by triton {version}, and this is {triton.__version__}")
    sources = kernel_sources()
    fresh = [one for one in cubins if sources.get(one.kernel, ("", None))[0] == one.source]
    for one in fresh:
        manifest.check_files(folder, [one.file, metadata_file(one.file)])
        _preload(sources[one.kernel][1], one, folder)
    other = len(cubins) - len(fresh)
    return Loaded(len(fresh), f"{other} are of another version of the kernels" if other else "")


def metadata_file(cubin: str) -> str:
    """The file that describes a cubin to triton."""
    return str(PurePosixPath(cubin).with_suffix(".json"))


def forward_kernels() -> tuple[Any, ...]:
    """The kernels that a program without gradients launches."""
    from tilecut_runtime.kernels.attention_decode import attention_combine, attention_decode
    from tilecut_runtime.kernels.attention_forward import attention_forward

    return attention_forward, attention_decode, attention_combine


def kernel_sources() -> dict[str, tuple[str, Any]]:
    """Those kernels by name: (a hash of the source and of what it calls, the function)."""
    return {function.fn.__name__: (function.cache_key, function) for function in forward_kernels()}


def _preload(function: Any, cubin: Cubin, folder: Path) -> None:
    """Let triton build its kernel of the cubin, and keep it for the launch that it is for."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.cache import FileCacheManager

    binary = folder / cubin.file
    name = f"{cubin.kernel}.json"
    files = {name: str(binary.with_suffix(".json")), f"{cubin.kernel}.cubin": str(binary)}

    cache: Any = knobs.cache.manager_class or FileCacheManager

    class Carried(cache):
        """Triton's cache, which holds the cubin as what triton is about to compile."""

        def get_group(self, filename: str) -> dict[str, str] | None:
            return files if filename == name else super().get_group(filename)

    # A second one would take the place of a kernel that may be in use.
    active: Any = driver.active
    if cubin.launch["key"] in function.device_caches[active.get_current_device()][0]:
        return
    launch = {**cubin.launch, "target": vars(active.get_current_target())}
    with knobs.cache.scope():
        knobs.cache.manager_class = Carried
        function.preload(json.dumps(launch))
