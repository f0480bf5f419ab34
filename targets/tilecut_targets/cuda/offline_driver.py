"""Compile launches for a GPU that is not here, by the very path that a launch takes on it.

`compile_offline` puts a driver in the place of triton's, which answers with the architecture that is asked for, and
warms the launches up. Triton then specializes the arguments, compiles and reports as it would there, so that what comes
out can be handed to it there.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tilecut_runtime.kernels.choose_tile import Tile
from tilecut_runtime.launch_attention import Launch

# Triton keeps what it compiled by device: every compilation here is a device of its own.
_DEVICES = itertools.count(1_000_000)


@dataclass(frozen=True)
class Compiled:
    """A kernel as triton compiled it, and what triton said of the launch that it is for (`specialization`, JSON)."""

    kernel: str
    tile: Tile
    binary: Any
    specialization: str


class _Driver:
    """The questions that triton asks its driver before it compiles."""

    def __init__(self, target: GPUTarget, device: int):
        self.target, self.device = target, device

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_offline(launches: Iterable[Launch], target: GPUTarget) -> Iterator[Compiled]:
    """Every kernel that the launches need, once."""
    with offline(target), knobs.compilation.scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Line tables are two thirds of a cubin.
        knobs.compilation.disable_line_info = True
        for launch in launches:
            binary, specialization = _compile(launch)
            if specialization is not None:
                yield Compiled(launch.kernel.fn.__name__, launch.tile, binary, specialization)


def _compile(launch: Launch) -> tuple[Any, str | None]:
    """The kernel, and what triton says of it when it compiles it now; nothing where it has it already."""
    reported: list[str] = []
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda *, compile, **_: reported.append(compile["specialization_data"])
        binary = launch.run(warmup=True)
    return binary, reported[0] if reported else None


@contextmanager
def offline(target: GPUTarget) -> Iterator[None]:
    """Triton takes the current device for one of `target`."""
    # Not `reset_active`: it asks for a driver of this machine, which may have none.
    before = driver._active
    driver.set_active(_Driver(target, next(_DEVICES)))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = before
