"""PyTorch's native package of an artifact's program: made by `tilecut build` where its GPU is, and opened there.

AOTInductor compiles everything but attention into one library with the weights in it; attention is called through
torch's dispatcher, so that the kernels of `tilecut_runtime.kernels` run. PyTorch cannot build it for a GPU that is not
there. `native/<arch>/model.pt2` is the package, `native/<arch>/build.json` says what it was built with; both are listed in
the manifest, whose entry "native:<arch>" names the package.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tilecut_runtime.errors import ArtifactError, VerificationError, first_line
from tilecut_runtime.manifest import MANIFEST, FileEntry, Manifest, Rung, read_json, sha256
from tilecut_runtime.reference import read_cases
from tilecut_runtime.torch_program import ready_program

PACKAGE, FACTS = "model.pt2", "build.json"


def open_native(folder: Path, manifest: Manifest, arch: str) -> tuple[Callable[..., Any] | None, str]:
    """(the package for an architecture, "") or (None, why there is none to take; empty where none was built).

    Raises:
        ArtifactError: the package is damaged.
    """
    if (name := manifest.entry.get(f"native:{arch}")) is None:
        return None, ""
    facts = str(Path(name).with_name(FACTS).as_posix())
    manifest.check_files(folder, [name, facts])
    held = read_json(folder / facts)
    built = held.get("torch") if isinstance(held, dict) else None
    if built != torch.__version__:
        return (
            None,
            f"the native package is of torch {built}, and this is {torch.__version__}: run `tilecut build` again",
        )
    try:
        return _load(folder / name), ""
    except RuntimeError as e:
        raise ArtifactError(
            str(folder / name), f"torch cannot open it ({first_line(e)})", fix="run `tilecut build` again"
        ) from e


def build_native(folder: str | Path, device: str) -> Rung:
    """Compile the artifact's program for a device of this machine, check it, and put it into the artifact.

    Returns:
        The rung that compares it with the reference outputs.

    Raises:
        ArtifactError: no torch program, a file is damaged, or Inductor cannot compile it.
        VerificationError: the package gives other outputs; the artifact is left as it was.
    """
    from tilecut_runtime.torch_runner import architecture_of, check_device

    folder = Path(folder)
    manifest = Manifest.read(folder)
    if manifest.runtime != "torch":
        raise ArtifactError(
            str(folder), "only a cuda artifact has a native package", got=f"an artifact for {manifest.target}"
        )
    device = check_device(folder, device)
    cases = read_cases(folder, manifest)
    arch = architecture_of(device)
    program = ready_program(folder, manifest, "model", device)
    # The largest: Inductor takes sizes of 1 for constants.
    sample = max(cases, key=lambda case: min(min(v.shape, default=1) for v in case.inputs.values()))
    program.example_inputs = ((), {k: torch.from_numpy(v).to(device) for k, v in sample.inputs.items()})
    with tempfile.TemporaryDirectory(prefix=".native.", dir=folder) as scratch:
        package = Path(scratch) / PACKAGE
        try:
            with torch.no_grad():
                torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        # Inductor raises what its passes, its code and the compiler that it calls raise.
        except Exception as e:
            raise ArtifactError(str(folder), f"torch's Inductor cannot compile the program: {first_line(e)}") from e
        run = _load(package)
        worst = 0.0
        for case in cases:
            with torch.no_grad():
                out = run(**{k: torch.from_numpy(v).to(device) for k, v in case.inputs.items()})
            worst = max(worst, case.error({k: v.cpu().numpy() for k, v in out.items()}))
        if not worst <= manifest.tolerance:
            raise VerificationError(
                "native package", "it gives other outputs than the pruned model", got=f"{worst:.2e}",
                wanted=f"at most {manifest.tolerance:.0e}", fix="the artifact is as it was; please report the model",
            )  # fmt: skip
        facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": device_name(device)}
        (Path(scratch) / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _take_in(folder, manifest, arch, Path(scratch))
    return Rung(f"native package for {arch}", "passed", "against the pruned model", worst, manifest.tolerance)


def device_name(device: str) -> str:
    """What a device calls itself."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def _load(package: Path) -> Callable[..., Any]:
    return torch._inductor.aoti_load_package(str(package))


def _take_in(folder: Path, manifest: Manifest, arch: str, made: Path) -> None:
    """Move the files into place, then the manifest that lists them; whoever reads meanwhile sees the old one."""
    home = folder / "native" / arch
    home.mkdir(parents=True, exist_ok=True)
    for name in (PACKAGE, FACTS):
        os.replace(made / name, home / name)
        key = f"native/{arch}/{name}"
        manifest.files[key] = FileEntry((home / name).stat().st_size, sha256(home / name))
    manifest.entry[f"native:{arch}"] = f"native/{arch}/{PACKAGE}"
    scratch = Path(tempfile.mkdtemp(prefix=".manifest.", dir=folder))
    try:
        manifest.write(scratch)
        os.replace(scratch / MANIFEST, folder / MANIFEST)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
