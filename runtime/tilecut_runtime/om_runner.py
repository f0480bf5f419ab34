"""Run an ascend artifact's `om/model.om` on an NPU, through ais_bench; `build_on_cann.sh` makes the file.

The .om is built on the machine that runs it and is no part of what the compile wrote: the manifest holds no hash of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilecut_runtime.errors import ArtifactError, InputError, first_line
from tilecut_runtime.manifest import Manifest

BUILT, SCRIPT = "om/model.om", "build_on_cann.sh"
REFERENCE = 'load it with device="reference" to run its verify twin in onnxruntime'


def npu_number(folder: Path, device: str | None) -> int:
    """The number of the NPU that a device names: None and "npu" are 0.

    Raises:
        ArtifactError: it names none.
    """
    name, _, number = (device or "npu").partition(":")
    if name != "npu" or not (number or "0").isdecimal():
        raise ArtifactError(
            str(folder),
            "an ascend artifact runs on an NPU",
            got=f"device={device!r}",
            wanted='None, "npu" or "npu:<number>"',
            fix=REFERENCE,
        )
    return int(number or 0)


def om_runner(folder: Path, manifest: Manifest, number: int) -> Any:
    """A runner over the built model.

    Raises:
        ArtifactError: it is not built, or ais_bench is not installed or cannot open it.
    """
    if not (folder / BUILT).is_file():
        raise ArtifactError(
            str(folder),
            f"running an ascend artifact needs CANN and an NPU, and {BUILT} is not built yet",
            fix=f"run ./{SCRIPT} in it where CANN is; or {REFERENCE}",
        )
    try:
        interface = importlib.import_module("ais_bench.infer.interface")
    except ModuleNotFoundError as e:
        raise ArtifactError(
            str(folder), "running an .om needs ais_bench, which is not installed", fix=f"install it; or {REFERENCE}"
        ) from e
    try:
        session = interface.InferSession(number, str(folder / BUILT))
    # Its exceptions are acl's, which have no public base.
    except Exception as e:
        raise ArtifactError(str(folder / BUILT), f"ais_bench cannot open it: {first_line(e)}") from e
    command = folder / f"{BUILT}.command"
    dynamic = command.is_file() and "--dynamic_dims" in command.read_text(encoding="utf-8")
    mode = "dymdims" if dynamic else "static"

    def run(arrays: dict[str, np.ndarray]) -> Sequence[Any]:
        feeds = [np.ascontiguousarray(arrays[spec.name]) for spec in manifest.inputs]
        try:
            return session.infer(feeds, mode)
        except Exception as e:
            raise InputError("Session.run", f"ais_bench cannot run the model on these inputs: {first_line(e)}") from e

    return run
