"""What a measurement belongs to: the machine, and the versions of what took part. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from tilecut_runtime.processor import processor_name

TOOLS = (
    *("tilecut", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "openvino", "executorch"),
    *("numpy", "scipy"),
)


def machine() -> dict[str, Any]:
    """The processor and how many of it."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
    }


def tool_versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "tilecut":
                from tilecut import __version__

                found[name] = __version__
    return found
