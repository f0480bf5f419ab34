"""Targets by name, imported when asked for: "edge", "edge:openvino", "cuda", "ascend", "ascend:Ascend910B3"."""

from __future__ import annotations

import importlib

from tilecut_runtime.errors import ConfigError
from tilecut_targets.target import Target

TARGETS = {
    "edge": "tilecut_targets.edge.find_runtime:find_runtime",
    "cuda": "tilecut_targets.cuda.target:CudaTarget",
    "ascend": "tilecut_targets.ascend.target:AscendTarget",
}


def find_target(wanted: str | Target) -> Target:
    """The target called `wanted`, "name" or "name:chip"; a Target is returned as it is.

    Raises:
        ConfigError: no such target or chip.
    """
    if isinstance(wanted, Target):
        return wanted
    if not isinstance(wanted, str):
        raise ConfigError(
            "target", "neither a name nor a Target", got=type(wanted).__name__, wanted=" or ".join(TARGETS)
        )
    name, _, chip = wanted.partition(":")
    if name not in TARGETS:
        raise ConfigError(
            "target",
            "unknown target",
            got=repr(wanted),
            wanted=" or ".join(map(repr, TARGETS)),
            fix="`tilecut targets` lists them",
        )
    # A class, or a function that picks one by the chip.
    module, _, make = TARGETS[name].partition(":")
    return getattr(importlib.import_module(module), make)(chip=chip or None)
