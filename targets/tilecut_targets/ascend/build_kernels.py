"""The attention kernels of a graph, lowered for Atlas A2, A3 and the 950 family, and what can be checked of them here.

    kernels/<name>/kernel.py                the Triton source that was lowered
                   kernel.ttir              Triton's IR of it
                   kernel.ttadapter.mlir    linalg, what bishengir-compile on a CANN machine takes
                   kernel.hivm.mlir         cube and vector code with every buffer placed
                   kernel.o                 the object, where bishengir-compile and hivmc of CANN are on PATH (by older
                                            compilers kernel_reloc.o)
                   use.json                 what it is for, its tile, bytes of each memory, and the command that makes kernel.o

The rungs of the verification ladder that need no NPU: the linalg IR, and the IR after the compiler's fusing passes, run on
this CPU against float64; the plan's bytes against the chip's memories.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tilecut_passes.graph import Graph
from tilecut_runtime.errors import ArtifactError, LoweringError
from tilecut_runtime.manifest import Rung, read_json, sha256
from tilecut_targets.ascend.choose_tile import list_tiles
from tilecut_targets.ascend.environments import INSTALL, installed, is_installed
from tilecut_targets.ascend.list_kernels import Wanted, list_kernels
from tilecut_targets.ascend.plan_kernel import (
    ENVIRONMENT,
    KERNEL,
    LINALG,
    PLAN,
    SOURCE,
    Chip,
    Planned,
    Tile,
    Variant,
    compiler_options,
    plan_kernel,
)
from tilecut_targets.ascend.read_plan import read_plan
from tilecut_targets.ascend.run_kernel import LIMITS, run_kernel

FOLDER, USE, STEM = "kernels", "use.json", "kernel"
OBJECTS = (f"{STEM}.o", f"{STEM}_reloc.o")
# Chips that triton-ascend compiles for.
FAMILIES = ("a2", "a3", "a950")
COMPILERS = ("bishengir-compile", "hivmc")
RAN, FUSED, FITS = "kernels run as linalg", "kernels run after HFusion", "kernels fit the chip"
# Seconds of one object.
TIMEOUT = 600.0


class _Chip(NamedTuple):
    """A chip as use.json names it."""

    soc: str
    family: str


def compile_kernels(graph: Graph, chip: Chip, folder: Path) -> dict[str, Any]:
    """Write `kernels/` for every attention of a fused graph; what was written, and what no kernel is for.

    Raises:
        ConfigError: the private environment is not installed.
        LoweringError: no tile fits, or the compiler failed.
    """
    if chip.family not in FAMILIES:
        why = f"triton-ascend compiles for {', '.join(FAMILIES)}, not for {chip.soc}"
        return {"kernels": [], "refused": [{"node": "*", "why": why}]}
    wanted, refusals = list_kernels(graph)
    uses = [_compile(one, chip, folder / FOLDER / one.variant.name) for one in wanted]
    return {"kernels": uses, "refused": [{"node": r.node, "why": r.why} for r in refusals]}


def check_kernels(folder: Path) -> list[Rung]:
    """The rungs of an artifact's kernels; none where it has no kernels.

    Raises:
        ArtifactError: a kernel's files are missing, or are not what its use.json says.
    """
    names = sorted(path.parent for path in (folder / FOLDER).glob(f"*/{USE}"))
    if not names:
        return []
    uses = {name: _read_use(name) for name in names}
    return [_check_run(uses, "linalg", RAN), _check_run(uses, "hfusion", FUSED), _check_fit(uses)]


def choose(wanted: Wanted, chip: Chip, folder: Path) -> Planned:
    """The first tile whose plan fits with nothing switched off, else the first that fits; `folder` gets its files.

    Raises:
        LoweringError: none fits.
    """
    worse: Tile | None = None
    for tile in list_tiles(wanted.variant, wanted.nq, wanted.nk):
        planned = plan_kernel(wanted.variant, tile, chip, folder)
        if planned is None:
            continue
        if not planned.degraded:
            return planned
        worse = worse or tile
    planned = plan_kernel(wanted.variant, worse, chip, folder) if worse else None
    if planned is None:
        raise LoweringError(
            "compile_kernels",
            f"no tile of {wanted.variant.name} fits {chip.soc}",
            got=f"{wanted.nq} queries, {wanted.nk} keys",
            fix="prune the head width",
        )
    return planned


def _compile(wanted: Wanted, chip: Chip, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    planned = choose(wanted, chip, folder)
    shutil.copyfile(SOURCE, folder / "kernel.py")
    versions = next(dict(one.versions) for one in installed() if one.name == ENVIRONMENT and one.current)
    command = ["bishengir-compile", LINALG, *compiler_options(chip), "-o", STEM]
    use = {
        "kernel": KERNEL,
        "soc": chip.soc,
        "family": chip.family,
        "variant": asdict(wanted.variant),
        "nodes": list(wanted.nodes),
        "tile": list(planned.tile),
        "memories": {name: asdict(memory) for name, memory in planned.memories.items()},
        "degraded": planned.degraded,
        "switched_off": list(planned.retries),
        "arguments": wanted.variant.signature(),
        "command": shlex.join(command),
        "needs": "CANN: bishengir-compile and hivmc on PATH",
        "source_sha256": sha256(folder / "kernel.py"),
        "versions": {name: versions[name] for name in ("triton-ascend", "ascendnpu-ir")},
    }
    if all(shutil.which(tool) for tool in COMPILERS):
        made = _make_object(command, folder)
        use["object"] = {"file": made.name, "sha256": sha256(made)}
    (folder / USE).write_text(json.dumps(use, indent=1) + "\n", encoding="utf-8")
    return {"name": folder.name, **use}


def _make_object(command: list[str], folder: Path) -> Path:
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as e:
        raise LoweringError("bishengir-compile", "ran out of time", wanted=f"at most {TIMEOUT:g} s") from e
    made = [folder / name for name in OBJECTS if (folder / name).is_file()]
    if ran.returncode or not made:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        got = " | ".join(lines[-4:]) or f"exit code {ran.returncode}"
        raise LoweringError(
            "bishengir-compile", f"made no object of {folder.name}", got=got, wanted=" or ".join(OBJECTS)
        )
    return made[0]


def _read_use(folder: Path) -> dict[str, Any]:
    use = read_json(folder / USE)
    for name in ("kernel.py", LINALG, PLAN):
        if not (folder / name).is_file():
            raise ArtifactError(str(folder / name), "file of a kernel is missing", fix="compile the model again")
    if sha256(folder / "kernel.py") != use["source_sha256"]:
        raise ArtifactError(
            str(folder / "kernel.py"), f"is not the source that {USE} speaks of", fix="compile the model again"
        )
    return use


def _check_run(uses: dict[Path, dict[str, Any]], stage: str, rung: str) -> Rung:
    if not is_installed(ENVIRONMENT):
        return Rung(rung, "not run", f"needs the private environment: {INSTALL}")
    chips = {name: _Chip(use["soc"], use["family"]) for name, use in uses.items()}
    if stage == "hfusion" and any(chip.family == "a950" for chip in chips.values()):
        why = "for the 950 family the passes leave vector code in a dialect that bishengir-opt cannot turn back"
        return Rung(rung, "not run", why)
    worst, limit, failed = 0.0, max(LIMITS[use["variant"]["dtype"]] for use in uses.values()), []
    for name, use in uses.items():
        variant = Variant(**use["variant"])
        error = run_kernel(name / LINALG, variant, Tile(*use["tile"]), chips[name], stage)
        if error > LIMITS[variant.dtype]:
            failed.append(name.name)
        worst = max(worst, error)
    detail = f"{_listed(uses)} on this CPU, against float64"
    if failed:
        detail += f"; wrong: {', '.join(failed)}"
    return Rung(rung, "failed" if failed else "passed", detail, worst, limit)


def _check_fit(uses: dict[Path, dict[str, Any]]) -> Rung:
    largest, said, wrong = 0.0, [], []
    for name, use in uses.items():
        memories = read_plan((name / PLAN).read_text(encoding="utf-8"))
        shares = [memory.used / memory.capacity for memory in memories.values()]
        largest = max(largest, *shares)
        if max(shares) > 1 or {key: asdict(memory) for key, memory in memories.items()} != use["memories"]:
            wrong.append(name.name)
        bytes_of = ", ".join(f"{key} {memory.used:,} of {memory.capacity:,}" for key, memory in memories.items())
        block_m, block_n = use["tile"]
        off = f", degraded: {', '.join(use['switched_off'])} switched off" if use["degraded"] else ""
        said.append(f"{name.name} {block_m}x{block_n}: {bytes_of}{off}")
    chip = " and ".join(sorted({use["soc"] for use in uses.values()}))
    detail = f"memory plan for {chip}, bytes; {'; '.join(said)}"
    if wrong:
        detail += f"; too large, or not what {USE} says: {', '.join(wrong)}"
    return Rung(FITS, "failed" if wrong else "passed", detail, largest, 1.0)


def _listed(names: Iterable[Path]) -> str:
    return ", ".join(path.name for path in names)
