"""The name of this machine's processor: what measured times hold for."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The model's name where the system tells it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
