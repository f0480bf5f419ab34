"""The private environments of the ascend target: tools that cannot live beside tilecut's own packages.

triton-ascend installs a package named `triton`, and torch_npu wants stub libraries in place of CANN's: each has a
virtual environment of its own in tilecut's cache, built by pip from pins, and is driven as a subprocess with JSON on
stdin and stdout. `tilecut toolchain install ascend` builds them.

    TILECUT_CACHE or ~/.cache/tilecut/toolchains/<name>-<hash of its pins>/
        bin/python ..           what `python -m venv` made
        environment.json        the pins, the versions that the check found, bytes; its presence says "finished"

An environment is built under a temporary name, checked, and renamed: it is never seen half made. It is not relocatable
by pip's own scripts (their first line names the folder they were made in), so only `bin/python` of it is called. Pins
that change make another folder; `remove` takes all of a name's.

The scripts that run inside are in `in_environment/`: each reads one JSON object from stdin and prints its answer, one
JSON object, as the last line of stdout. They import nothing of tilecut's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilecut_runtime.errors import ConfigError, LoweringError
from tilecut_runtime.manifest import read_json

SCRIPTS = Path(__file__).with_name("in_environment")
RECORD = "environment.json"
INSTALL = "tilecut toolchain install ascend"
# Seconds for pip to fetch and unpack a gigabyte, and for a check to import and start every tool.
PIP_TIMEOUT, CHECK_TIMEOUT = 3600.0, 300.0
# How many of a failed command's last lines an error quotes.
QUOTED_LINES = 8


@dataclass(frozen=True)
class Environment:
    """What is installed, by which steps, and how it is checked.

    `installs` are the arguments of one `pip install` each. `finish`, where there is one, is a script that is run once
    inside after them, with {"folder": the environment's}; it makes what pip cannot, and its content counts as a pin.
    `check` is a script that imports and starts everything and answers {"versions": {tool: version}}. `variables` are
    set for every script, "{folder}" standing for the environment's own.
    """

    installs: tuple[tuple[str, ...], ...]
    check: str
    finish: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    # The newest Python that the pinned wheels are made for.
    newest_python: tuple[int, int] | None = None

    @property
    def pins(self) -> list[str]:
        """What its hash is made of, and what a record says was installed."""
        made = [] if self.finish is None else [f"{self.finish}:{_digest((SCRIPTS / self.finish).read_bytes())}"]
        return [" ".join(arguments) for arguments in self.installs] + made


ENVIRONMENTS: dict[str, Environment] = {
    # Triton -> linalg MLIR -> memory-planned HIVM IR; llvmlite runs the linalg IR on x86.
    "ascend-kernels": Environment(
        installs=(
            ("--no-deps", "triton-ascend==3.2.0", "ascendnpu-ir==1.2.0"),
            ("pybind11==3.1.0", "numpy==2.3.5", "llvmlite==0.50.0"),
        ),
        check="check_kernels.py",
        newest_python=(3, 11),
    ),
    # torch_npu's schemas and torchair's converters, with libraries that stand in for CANN's.
    "ascend-air": Environment(
        installs=(
            ("torch==2.13.0", "numpy==2.3.5"),
            ("--no-deps", "torch_npu==2.13.0"),
            ("pyyaml", "attrs", "packaging", "protobuf==7.36.2"),
        ),
        check="check_air.py",
        finish="make_stubs.py",
        variables={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "LD_LIBRARY_PATH": "{folder}/stubs"},
    ),
}


@dataclass(frozen=True)
class Installed:
    """An environment that is there; not `current` where its pins are not those of this tilecut."""

    name: str
    folder: Path
    bytes: int
    versions: Mapping[str, str]
    current: bool


def toolchains() -> Path:
    """The folder of all environments."""
    return Path(os.environ.get("TILECUT_CACHE") or Path.home() / ".cache" / "tilecut") / "toolchains"


def names_of(group: str) -> list[str]:
    """The environments that "ascend" stands for, or the one of that name.

    Raises:
        ConfigError: no such environment.
    """
    names = [name for name in ENVIRONMENTS if group == name or name.startswith(f"{group}-")]
    if not names:
        raise ConfigError(
            "toolchain", "unknown toolchain", got=repr(group), wanted=f"ascend, {', '.join(ENVIRONMENTS)}"
        )
    return names


def folder_of(name: str) -> Path:
    """Where an environment is, or would be."""
    return toolchains() / f"{name}-{_digest(json.dumps(ENVIRONMENTS[name].pins).encode())}"


def is_installed(name: str) -> bool:
    """Whether the environment with today's pins is there."""
    return (folder_of(name) / RECORD).is_file()


def installed() -> list[Installed]:
    """Every environment in the cache, those of older pins too."""
    found = []
    for record in sorted(toolchains().glob(f"*/{RECORD}")):
        # A dot begins what is being built or removed.
        if record.parent.name.startswith("."):
            continue
        held = read_json(record)
        name = held["name"]
        current = name in ENVIRONMENTS and record.parent == folder_of(name)
        found.append(Installed(name, record.parent, held["bytes"], held["versions"], current))
    return found


def install(name: str, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The environment's folder: the one that is there if it passes its check, else a new one.

    Raises:
        ConfigError: no Python that the wheels are made for, pip failed, or what it installed does not pass the check.
    """
    environment, folder = ENVIRONMENTS[name], folder_of(name)
    toolchains().mkdir(parents=True, exist_ok=True)
    # Two installs at once: the second waits, and finds what the first one made.
    with _locked(toolchains() / f".{folder.name}.lock"):
        if is_installed(name):
            tell(f"{name}: checking {folder}")
            try:
                _check(environment, folder)
                return folder
            except LoweringError as e:
                tell(f"{name}: it does not pass its check and is built again ({e.problem})")
        # The lock is ours: what is under a temporary name was left by an install that was killed.
        for left in toolchains().glob(f".{folder.name}-*"):
            shutil.rmtree(left)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=toolchains()))
        try:
            _build(name, building, tell)
            if folder.exists():
                _delete(folder)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def remove(name: str) -> int:
    """Delete a name's environments, of whatever pins; the bytes that this frees."""
    freed = 0
    for one in installed():
        if one.name == name:
            with _locked(toolchains() / f".{one.folder.name}.lock"):
                _delete(one.folder)
            freed += one.bytes
    return freed


def call(name: str, script: Path, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """What a script answers that runs inside the environment; `timeout` in seconds.

    Raises:
        ConfigError: the environment is not installed.
        LoweringError: the script failed (its last lines are quoted) or ran longer than `timeout`.
    """
    if not is_installed(name):
        raise ConfigError(name, "this private environment is not installed", fix=f"run `{INSTALL}`")
    return _call(ENVIRONMENTS[name], folder_of(name), script, request, timeout)


def _call(
    environment: Environment, folder: Path, script: Path, request: Mapping[str, Any], timeout: float
) -> dict[str, Any]:
    command = [str(folder / "bin" / "python"), str(script)]
    output = _run(script.stem, command, _variables(environment, folder), timeout, json.dumps(request))
    lines = output.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise LoweringError(script.stem, "the script's last line is no JSON object", got=repr(lines[-1:]))
    return answer


def _build(name: str, folder: Path, tell: Callable[[str], None]) -> None:
    environment = ENVIRONMENTS[name]
    tell(f"{name}: making a virtual environment")
    variables = _variables(environment, folder)
    try:
        without = [] if environment.installs else ["--without-pip"]
        _run("venv", [_python(environment), "-m", "venv", *without, str(folder)], variables, CHECK_TIMEOUT)
        for arguments in environment.installs:
            tell(f"{name}: pip install {' '.join(arguments)}")
            command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-input", *arguments]
            _run("pip", command, variables, PIP_TIMEOUT)
        if environment.finish is not None:
            tell(f"{name}: {environment.finish}")
            _call(environment, folder, SCRIPTS / environment.finish, {"folder": str(folder)}, PIP_TIMEOUT)
        tell(f"{name}: checking")
        versions = _check(environment, folder)
    except LoweringError as e:
        raise ConfigError(f"toolchain {name}", f"cannot be built ({e.where}: {e.problem})", got=e.got, fix=e.fix) from e
    record = {"name": name, "pins": environment.pins, "versions": versions, "bytes": _size(folder)}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _check(environment: Environment, folder: Path) -> dict[str, str]:
    return _call(environment, folder, SCRIPTS / environment.check, {}, CHECK_TIMEOUT)["versions"]


def _python(environment: Environment) -> str:
    """A Python that the pinned wheels are made for: this one, or the newest that is new enough, from PATH."""
    newest = environment.newest_python
    if newest is None or sys.version_info[:2] <= newest:
        return sys.executable
    name = f"python{newest[0]}.{newest[1]}"
    found = shutil.which(name)
    if found is None:
        got = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise ConfigError(
            "toolchain",
            "no Python that the pinned wheels are made for",
            got=got,
            wanted=name,
            fix=f"put {name} on PATH",
        )
    return found


def _variables(environment: Environment, folder: Path) -> dict[str, str]:
    """The caller's environment variables without those that would bring its packages in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON_", "VIRTUAL_ENV"))}
    own = {name: value.format(folder=folder) for name, value in environment.variables.items()}
    return {**kept, "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1", **own}


def _run(what: str, command: list[str], variables: dict[str, str], timeout: float, text: str = "") -> str:
    """The command's stdout; everything it started is stopped when its time is over."""
    # Of a session of its own: a compiler that it started ends with it.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(text, timeout)
        except BaseException as e:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(e, subprocess.TimeoutExpired):
                raise LoweringError(what, "ran out of time and was stopped", wanted=f"at most {timeout:g} s") from e
            raise
    if process.returncode:
        lines = [line.strip() for line in (errors.strip() or output).splitlines() if line.strip()]
        last = " | ".join(lines[-QUOTED_LINES:])[-1500:]
        raise LoweringError(what, f"failed with exit code {process.returncode}", got=last or "no message")
    return output


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _delete(folder: Path) -> None:
    """Out of sight first: what is half deleted must not be found."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}-removed-", dir=folder.parent))
    folder.rename(doomed / folder.name)
    shutil.rmtree(doomed)


def _size(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
