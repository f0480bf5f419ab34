"""PyTorch's native package of an artifact's program: made by `tilecut build` where its GPU is, and opened there.

AOTInductor compiles everything but attention into one library with the weights in it; attention is called through
torch's dispatcher, so that the kernels of `tilecut_runtime.kernels` run. PyTorch cannot build it for a GPU that is not
there. `native/<arch>-<hash>/model.pt2` is the package, `build.json` beside it says what it was built with; both are listed
in the manifest, whose entry "native:<arch>" names the package. The package holds compiled code with the names of the
folders that it was compiled in.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from tilecut_runtime.errors import ArtifactError, VerificationError, first_line
from tilecut_runtime.manifest import MANIFEST, FileEntry, Manifest, Rung, read_json, sha256
from tilecut_runtime.reference import Case, read_cases
from tilecut_runtime.torch_program import ready_program

PACKAGE, FACTS = "model.pt2", "build.json"
# Of these, what a package was built with must be what opens it.
NEEDED = ("torch", "instructions")

Package = Callable[..., Any]


def open_native(folder: Path, manifest: Manifest, arch: str, device: str) -> tuple[Package | None, str]:
    """(the package for an architecture, "") or (None, why there is none to take; empty where none was built).

    Raises:
        ArtifactError: the package is damaged.
    """
    if (name := manifest.entry.get(f"native:{arch}")) is None:
        return None, ""
    facts = str(PurePosixPath(name).with_name(FACTS))
    manifest.check_files(folder, [name, facts])
    held, here = read_json(folder / facts), build_facts(device)
    for what in NEEDED:
        built = held.get(what) if isinstance(held, dict) else None
        if built != here[what]:
            return None, f"the native package is of {what} {built}, and this is {here[what]}: run `tilecut build` again"
    try:
        return _load(folder / name, device), ""
    except RuntimeError as e:
        raise ArtifactError(
            str(folder / name), f"torch cannot open it ({first_line(e)})", fix="run `tilecut build` again"
        ) from e


def build_native(folder: str | Path, device: str) -> Rung:
    """Compile the artifact's program for a device of this machine, check it, and put it into the artifact.

    Returns:
        The rung that compares it with the reference outputs; the manifest has it too.

    Raises:
        ArtifactError: no torch program, a file is damaged, or torch cannot compile, open or run the package.
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
    arch = architecture_of(folder, device)
    program = ready_program(folder, manifest, "model", device)
    # The largest: Inductor takes sizes of 1 for constants.
    sample = max(cases, key=lambda case: min(min(v.shape, default=1) for v in case.inputs.values()))
    program.example_inputs = ((), _on(sample, device))
    with _scratch(folder) as scratch:
        package = Path(scratch) / PACKAGE
        # Inductor raises what its passes, its code and the compiler that it calls raise.
        try:
            with warnings.catch_warnings(), torch.no_grad(), on_device(device):
                warnings.simplefilter("ignore")
                torch._inductor.aoti_compile_and_package(program, package_path=str(package))
            worst = _worst(_load(package, device), cases, device)
        except Exception as e:
            raise ArtifactError(str(folder), f"torch cannot build the native package: {first_line(e)}") from e
        if not worst <= manifest.tolerance:
            raise VerificationError(
                "native package", "it gives other outputs than the pruned model", got=f"{worst:.2e}",
                wanted=f"at most {manifest.tolerance:.0e}", fix="the artifact is as it was; please report the model",
            )  # fmt: skip
        (Path(scratch) / FACTS).write_text(json.dumps(build_facts(device), indent=1) + "\n", encoding="utf-8")
        rung = Rung(f"native package for {arch}", "passed", "against the pruned model", worst, manifest.tolerance)
        _take_in(folder, arch, Path(scratch), rung)
    return rung


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[str]:
    """A folder in the artifact for what is being made."""
    try:
        with tempfile.TemporaryDirectory(prefix=".native.", dir=folder) as scratch:
            yield scratch
    except OSError as e:
        raise ArtifactError(str(folder), f"the package cannot be written ({e.strerror or e})") from e


def build_facts(device: str) -> dict[str, str | None]:
    """What a package is built with: torch, CUDA, the device, and on a CPU its instruction set."""
    if torch.device(device).type == "cuda":
        name, instructions = torch.cuda.get_device_name(device), None
    else:
        name, instructions = "cpu", f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "device": name, "instructions": instructions}


def on_device(device: str) -> contextlib.AbstractContextManager[Any]:
    """A CUDA device as the current one."""
    return torch.cuda.device(device) if torch.device(device).type == "cuda" else contextlib.nullcontext()


def _on(case: Case, device: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v).to(device) for k, v in case.inputs.items()}


def _worst(run: Package, cases: Sequence[Case], device: str) -> float:
    """The largest error of any case."""
    with torch.no_grad(), on_device(device):
        return max(case.error({k: v.cpu().numpy() for k, v in run(**_on(case, device)).items()}) for case in cases)


def _load(package: Path, device: str) -> Package:
    place = torch.device(device)
    return torch._inductor.aoti_load_package(
        str(package), device_index=(place.index or 0) if place.type == "cuda" else -1
    )


def _take_in(folder: Path, arch: str, made: Path, rung: Rung) -> None:
    """Move the files into place, then the manifest that lists them, then away with an older package.

    Whoever reads meanwhile sees the old manifest and its files, or the new one and its.
    """
    # Another machine may have put its own package in since.
    manifest = Manifest.read(folder)
    old = manifest.entry.get(f"native:{arch}")
    home = folder / "native" / f"{arch}-{sha256(made / PACKAGE)[:12]}"
    home.mkdir(parents=True, exist_ok=True)
    for name in (PACKAGE, FACTS):
        os.replace(made / name, home / name)
    key = home.relative_to(folder).as_posix()
    if old is not None:
        for name in (PACKAGE, FACTS):
            manifest.files.pop(str(PurePosixPath(old).with_name(name)), None)
    for name in (PACKAGE, FACTS):
        manifest.files[f"{key}/{name}"] = FileEntry((home / name).stat().st_size, sha256(home / name))
    manifest.entry[f"native:{arch}"] = f"{key}/{PACKAGE}"
    manifest.verification = (*(r for r in manifest.verification if r.name != rung.name), rung)
    scratch = Path(tempfile.mkdtemp(prefix=".manifest.", dir=folder))
    try:
        manifest.write(scratch)
        os.replace(scratch / MANIFEST, folder / MANIFEST)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if old is not None and (folder / old).parent != home:
        shutil.rmtree((folder / old).parent, ignore_errors=True)
