"""Build the kernels that a graph launches for GPUs that are not here, and list them in the artifact.

Before: the lowered graph. After: `kernels/<arch>/<kernel>-<n>.cubin`, beside each what triton's launcher reads, and
`kernels/kernels.json` with tile, shared memory, registers and spills; `tilecut_runtime.load_cubins` takes them from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

from tilecut_passes.graph import Graph
from tilecut_runtime.errors import ConfigError, LoweringError
from tilecut_runtime.load_cubins import Cubin, forward_kernels, kernel_sources, metadata_file, write_kernels
from tilecut_targets.cuda.chips import SHARED_LIMIT
from tilecut_targets.cuda.compile_kernels import gpu_target, read_cubin
from tilecut_targets.cuda.list_launches import list_launches
from tilecut_targets.cuda.offline_driver import Compiled, compile_offline


def build_cubins(graph: Graph, archs: Iterable[str], folder: Path) -> list[Cubin]:
    """Write the cubins of every attention of a lowered graph into an artifact's folder.

    Raises:
        ConfigError: the kernels were imported for triton's interpreter.
        LoweringError: a kernel needs more shared memory than the architecture has.
    """
    if not all(isinstance(function, triton.JITFunction) for function in forward_kernels()):
        raise ConfigError("build_cubins", "the kernels were imported for the interpreter", fix="unset TRITON_INTERPRET")
    sources = kernel_sources()
    cubins = []
    for arch in archs:
        for i, one in enumerate(compile_offline(list_launches(graph, arch), gpu_target(arch))):
            cubins.append(_write(one, arch, f"kernels/{arch}/{one.kernel}-{i}.cubin", sources[one.kernel][0], folder))
    if cubins:
        write_kernels(cubins, triton.__version__, folder)
    return cubins


def _write(one: Compiled, arch: str, file: str, source: str, folder: Path) -> Cubin:
    code, shared = one.binary.asm["cubin"], one.binary.metadata.shared
    if shared > SHARED_LIMIT[arch]:
        raise LoweringError(
            "build_cubins",
            f"{one.kernel} does not fit {arch}",
            got=f"{shared} bytes of shared memory with {one.tile}",
            wanted=f"at most {SHARED_LIMIT[arch]}",
            fix="another tile in tiles.json",
        )
    launch = json.loads(one.specialization)
    metadata = one.binary.metadata._asdict()
    for held in (launch["options"], metadata):
        # The path of a library on the machine that compiled.
        held.pop("extern_libs", None)
    # Triton 3.6 does not name it.
    launch.pop("target", None)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(code)
    (folder / metadata_file(file)).write_text(json.dumps(metadata, default=vars), encoding="utf-8")
    registers, _, instructions = read_cubin(code)
    constants = _constants(launch)
    return Cubin(
        file,
        one.kernel,
        arch,
        source,
        list(one.tile),
        next(launch["signature"][name] for name in ("Q", "Out") if name in launch["signature"]).removeprefix("*"),
        constants.get("D", constants["E"]),
        constants["E"],
        shared,
        registers,
        instructions["LDL"] + instructions["STL"],
        launch,
    )


def _constants(launch: dict[str, Any]) -> dict[str, Any]:
    """The launch's constants by name."""
    names = list(launch["signature"])
    places = zip(launch["constant_keys"], launch["constant_vals"])
    return {names[place[0]]: value for place, value in places if len(place) == 1}
