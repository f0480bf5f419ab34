"""The NPUs that `target="ascend:<soc>"` names: what ATC calls them, and what they are made of.

    cores           cube cores of one die; vector cores are twice as many on a2, a3 and a950
    gigahertz       of a cube core, which multiplies two fractals of 16 x 16 fp16 numbers in a cycle
    gigabytes       of memory bandwidth a second
    ub, l1, l0a, l0b, l0c   bytes of a core's memories; 0 where no public document says

Sources. Names, cores and bytes of a2, a3 and a950: the target descriptions in ascendnpu-ir 1.2.0
(`bishengir-opt --hacc-append-device-spec=target=<soc>`), read from there. Names of the others: the ATC guide, option
--soc_version ("Ascend" and what `npu-smi info` calls the chip). Bytes of b310: AscendNPU-IR's and PTO's descriptions of
Ascend310B. Gigahertz: the published peak of fp16 products over cores x 8192 (Atlas 800 A2 and A3, Atlas 300I Pro and Duo,
Atlas 200I A2, Atlas 300T data sheets; Ascend 950 white paper, table 3-1). Gigabytes: the same data sheets. The peaks and
bandwidths of ATC's names within a product line are the line's; they rank shapes, and were compared with no NPU.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from tilecut_runtime.errors import ConfigError

KIB = 1024
# Multiplications of a cube core in a cycle.
FRACTAL = 16
DEFAULT_SOC = "Ascend910B3"


@dataclass(frozen=True)
class Chip:
    """One NPU. `family` is the row of the legality table, `soc` what ATC's --soc_version takes."""

    soc: str
    family: str
    cores: int
    gigahertz: float
    gigabytes: float
    ub: int
    l1: int
    l0a: int
    l0b: int
    l0c: int

    @property
    def tflops(self) -> float:
        """Peak of dense fp16 products."""
        return self.cores * 2 * FRACTAL**3 * self.gigahertz / 1e3


# family -> bytes of UB, L1, L0A, L0B, L0C.
MEMORIES = {
    "a2": (192 * KIB, 512 * KIB, 64 * KIB, 64 * KIB, 128 * KIB),
    "a3": (192 * KIB, 512 * KIB, 64 * KIB, 64 * KIB, 128 * KIB),
    "a950": (248 * KIB, 512 * KIB, 64 * KIB, 64 * KIB, 256 * KIB),
    "p310": (256 * KIB, 1024 * KIB, 64 * KIB, 64 * KIB, 256 * KIB),
    "b310": (256 * KIB, 1024 * KIB, 64 * KIB, 64 * KIB, 128 * KIB),
    "a910": (256 * KIB, 1024 * KIB, 64 * KIB, 64 * KIB, 256 * KIB),
}


def _chips(family: str, names: str, cores: int, gigahertz: float, gigabytes: float) -> list[Chip]:
    return [Chip(f"Ascend{name}", family, cores, gigahertz, gigabytes, *MEMORIES[family]) for name in names.split()]


CHIPS = {
    chip.soc: chip
    for chip in (
        *_chips("a2", "910B1", 24, 1.9, 1600),
        *_chips("a2", "910B2 910B2C", 24, 1.8, 1600),
        *_chips("a2", "910B3", 20, 1.8, 1600),
        *_chips("a2", "910B4 910B4-1", 20, 1.5, 800),
        *_chips("a3", "910_9391 910_9392 910_9381 910_9382", 24, 1.8, 1600),
        *_chips("a3", "910_9372 910_9362", 20, 1.8, 1600),
        *_chips("a950", "950PR_9599", 36, 1.65, 1400),
        *_chips("a950", "950PR_9589 950PR_958a 950PR_958b", 32, 1.65, 1400),
        *_chips("a950", "950PR_9579 950PR_957b 950PR_957c 950PR_957d", 28, 1.65, 1400),
        *_chips("a950", "950DT_9591 950DT_9592", 36, 1.65, 4000),
        *_chips("a950", "950DT_9581 950DT_9582 950DT_9584", 32, 1.65, 4000),
        *_chips("p310", "310P1", 10, 1.08, 204.8),
        *_chips("p310", "310P3", 8, 1.08, 204.8),
        *_chips("b310", "310B1", 1, 1.22, 51.2),
        *_chips("b310", "310B4", 1, 0.5, 25.6),
        *_chips("a910", "910A", 32, 1.0, 1200),
    )
}
# Names of product lines, for the chip that stands for them.
LINES = {"910b": "Ascend910B3", "a2": "Ascend910B3", "a3": "Ascend910_9391", "950": "Ascend950PR_9589"}
LINES |= {"950pr": "Ascend950PR_9589", "950dt": "Ascend950DT_9582", "310p": "Ascend310P3", "310b": "Ascend310B1"}
DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16"}
DTYPES |= {"bfloat16": "bfloat16", "bf16": "bfloat16"}
# Every attention is to become the chip's fused op.
FUSED = "fused"


@dataclass(frozen=True)
class Wish:
    """What the words after "ascend:" ask for: a chip, the type of the file's weights and products, and `fused`, that an
    attention which the chip's fused op does not take is an error and not MatMul and Softmax."""

    chip: Chip
    dtype: str
    fused: bool = False


def find_chip(name: str) -> Chip:
    """The chip called `name`, in any case, with "Ascend" or without.

    Raises:
        ConfigError: there is none; the nearest name is in the message.
    """
    short = name.strip().lower().removeprefix("ascend")
    known = {soc.lower().removeprefix("ascend"): soc for soc in CHIPS} | LINES
    if short in known:
        return CHIPS[known[short]]
    near = difflib.get_close_matches(short, known, 1, 0.0)[0]
    raise ConfigError(
        "target",
        "unknown Ascend chip",
        got=repr(name),
        wanted=", ".join(CHIPS),
        fix=f"the nearest is {known[near]}; `npu-smi info` on the device says what it is",
    )


def read_wish(words: str | None) -> Wish:
    """The meaning of "Ascend310P3", "910b3,fp16,fused", "fp16": at most one chip and one type.

    Raises:
        ConfigError: an unknown word, or two chips or types.
    """
    given = [word.strip() for word in (words or "").split(",") if word.strip()]
    dtypes = {DTYPES[word.lower()] for word in given if word.lower() in DTYPES}
    chips = [find_chip(word) for word in given if word.lower() not in (*DTYPES, FUSED)]
    if len(dtypes) > 1 or len(chips) > 1:
        raise ConfigError(
            "target",
            "more than one chip or type",
            got=f"ascend:{words}",
            wanted="one of each",
            fix="compile once for each",
        )
    chip, dtype = chips[0] if chips else CHIPS[DEFAULT_SOC], dtypes.pop() if dtypes else "float32"
    return Wish(chip, dtype, FUSED in map(str.lower, given))
