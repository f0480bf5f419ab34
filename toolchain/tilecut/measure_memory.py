"""How much memory a contender takes: a process of its own opens it, runs it twice, and says how large it became.

    python -m tilecut.measure_memory '{"artifact": .., "device": .., "threads": 1, "inputs": "inputs.npz"}'
    python -m tilecut.measure_memory '{"peer": "openvino", "folder": .., "threads": 1, "inputs": "inputs.npz"}'

The figure is the high-water mark of the resident set: of the whole process, interpreter and libraries included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilecut_runtime.errors import TilecutError
from tilecut_runtime.huge_pages import in_huge_pages
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.reference import Arrays
from tilecut_runtime.session import Session, load, onnx_runner


class MemoryFailure(TilecutError):
    """The process that was to be measured ended early."""


def measure_memory(contender: Mapping[str, Any]) -> int:
    """The largest size in bytes of a process that opens and runs a contender.

    Raises:
        MemoryFailure: it failed, or the system does not say.
    """
    # It imports what this process imports, and nothing from the folder that it is started in (-P).
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tilecut.measure_memory", json.dumps(contender)],
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise MemoryFailure("memory", said[-1] if said else f"the process ended with code {done.returncode}")
    return int(lines[-1])


def open_artifact(folder: Path, device: str | None, threads: int) -> Callable[[Arrays], Arrays]:
    """An artifact as `load` opens it, but that onnxruntime's threads rest between runs, as those of its peers do."""
    manifest = Manifest.read(folder)
    if manifest.runtime == "onnxruntime" and device in (None, "cpu"):
        with in_huge_pages():
            return Session(folder, manifest, onnx_runner(folder, manifest, "model", threads, rest=True), "cpu").run
    return load(folder, device, threads).run


def _open(contender: Mapping[str, Any]) -> Callable[[Arrays], Arrays]:
    if "artifact" in contender:
        return open_artifact(Path(contender["artifact"]), contender["device"], contender["threads"])
    from tilecut_targets.open_peers import OPENERS

    return OPENERS[contender["peer"]](Path(contender["folder"]), contender["threads"])


def peak_bytes() -> int:
    """The high-water mark of this process's resident set."""
    # On Linux getrusage counts what the parent held when it started this process; this line starts anew.
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure the contender that the argument describes."""
    contender = json.loads(sys.argv[1])
    run = _open(contender)
    with np.load(contender["inputs"], allow_pickle=False) as held:
        inputs = {name: held[name] for name in held.files}
    for _ in range(2):
        run(inputs)
    print(peak_bytes())


if __name__ == "__main__":
    main()
