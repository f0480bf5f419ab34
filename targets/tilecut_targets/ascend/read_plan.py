"""What bishengir-compile's memory plan says: the bytes of each memory that it gives out, and what the chip has.

A plan is HIVM MLIR in which every buffer is a `hivm.hir.pointer_cast` of constant addresses in an address space:
ub (vector cores), cbuf = L1 and cc = L0C (cube cores). A kernel that uses both kinds of core has a function for each,
`.._mix_aic` and `.._mix_aiv`; L0A and L0B are not planned here. The module's header holds the chip's sizes, in bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tilecut_runtime.errors import LoweringError

# Address space in the IR -> the memory's name, and its size's in the header.
SPACES = {"ub": ("ub", "UB_SIZE"), "cbuf": ("l1", "L1_SIZE"), "cc": ("l0c", "L0C_SIZE")}
BITS = {"i1": 1, "i4": 4, "i8": 8, "ui8": 8, "f8E4M3FN": 8, "f8E5M2": 8, "i16": 16, "f16": 16, "bf16": 16}
BITS |= {"i32": 32, "f32": 32, "i64": 64, "f64": 64}

_CONSTANT = re.compile(r"\s*(%[-\w]+) = (?:arith\.constant (-?\d+) : i64|llvm\.mlir\.constant\((-?\d+) : i64\))")
_BUFFER = re.compile(r"pointer_cast\(([^)]*)\).*?: memref<([^,>]+).*?#hivm\.address_space<(\w+)>")
# "[NOTE] Ub overflow detected; automatically set enable-auto-multi-buffer to false and retrying compilation."
_RETRY = re.compile(r"overflow detected; automatically set (.*?) to false", re.IGNORECASE)


@dataclass(frozen=True)
class Memory:
    """Bytes that a plan uses of one memory of a core, and that the chip has of it."""

    used: int
    capacity: int


def read_plan(hivm: str) -> dict[str, Memory]:
    """ub, l1 and l0c of a plan: the end of the last buffer in each, over the functions that use it.

    Raises:
        LoweringError: a buffer whose address or size is no constant, an unknown type, or a header without sizes.
    """
    used = dict.fromkeys((name for name, _ in SPACES.values()), 0)
    constants: dict[str, int] = {}
    for line in hivm.splitlines():
        if "func.func" in line:
            constants = {}
        if found := _CONSTANT.match(line):
            constants[found[1]] = int(found[2] or found[3])
        elif "pointer_cast" in line:
            found = _BUFFER.search(line)
            if not found:
                raise _unreadable(line)
            if found[3] not in SPACES:
                continue
            name = SPACES[found[3]][0]
            for address in found[1].split(","):
                if address.strip() not in constants:
                    raise _unreadable(line)
                used[name] = max(used[name], constants[address.strip()] + _bytes(found[2], line))
    return {name: Memory(used[name], _capacity(hivm, size)) for name, size in SPACES.values()}


def read_retries(messages: Iterable[str]) -> list[str]:
    """What the compiler switched off by itself, because the buffers did not fit with it: a plan that is worse, silently."""
    return [found[1] for line in messages if (found := _RETRY.search(line))]


def _bytes(shape: str, line: str) -> int:
    *sizes, kind = shape.split("x")
    if kind not in BITS or not all(size.isdigit() for size in sizes):
        raise _unreadable(line)
    bits = BITS[kind]
    for size in sizes:
        bits *= int(size)
    return (bits + 7) // 8


def _capacity(hivm: str, name: str) -> int:
    found = re.search(rf'"{name}", (\d+)', hivm)
    if not found:
        raise LoweringError("read_plan", f"the plan's header has no {name}")
    return int(found[1]) // 8


def _unreadable(line: str) -> LoweringError:
    return LoweringError("read_plan", "a buffer of the plan has no constant place", got=line.strip()[:200])
