"""The first rung of targets that write ONNX: is the file ONNX at all?"""

from __future__ import annotations

from pathlib import Path

import onnx

from tilecut_runtime.errors import ArtifactError, first_line
from tilecut_runtime.manifest import Rung


def check_onnx(folder: Path, name: str) -> Rung:
    """The ONNX checker on one of the artifact's files.

    Raises:
        ArtifactError: the file is missing, damaged or not valid ONNX.
    """
    # protobuf's, the checker's and the shape inference's own classes.
    try:
        onnx.checker.check_model(str(folder / name))
    except Exception as e:
        raise ArtifactError(str(folder / name), f"not valid ONNX ({first_line(e)})", fix="compile it again") from e
    return Rung("onnx checker", "passed", f"{name} is valid ONNX")
