"""The GPUs that `target="cuda:<chip>"` names: what they are, in numbers of their makers' data sheets.

    tflops          dense products, no sparsity: 16-bit with float32 sums on tensor cores, and float32 on CUDA cores
    gigabytes       of memory bandwidth a second
    tile            rows and columns of the largest tile that a thread block of a library GEMM makes

Sources: NVIDIA A100 and A10 data sheets; Jetson AGX Orin Series technical brief (int8 figures halved for 16 bits); L4
and L40S data sheets, Ada GPU architecture whitepaper; H100 and H200 data sheets (SXM); HGX B200 data sheet; RTX Blackwell
GPU architecture whitepaper.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilecut_runtime.errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """One GPU. `processors` are its streaming multiprocessors."""

    name: str
    arch: str
    processors: int
    tflops: dict[str, float]
    gigabytes: float
    tile: tuple[int, int]


def _chip(name: str, arch: str, processors: int, half: float, single: float, gigabytes: float, columns: int) -> Chip:
    tflops = {"float16": half, "bfloat16": half, "float32": single}
    return Chip(name, arch, processors, tflops, gigabytes, (128, columns))


CHIPS = {
    chip.name: chip
    for chip in (
        _chip("a100", "sm_80", 108, 312.0, 19.5, 2039, 128),
        _chip("a10", "sm_86", 72, 125.0, 31.2, 600, 128),
        _chip("orin", "sm_87", 16, 42.5, 5.3, 204.8, 128),
        _chip("l40s", "sm_89", 142, 362.0, 91.6, 864, 128),
        _chip("l4", "sm_89", 58, 121.0, 30.3, 300, 128),
        _chip("h100", "sm_90", 132, 989.4, 67.0, 3350, 256),
        _chip("h200", "sm_90", 132, 989.4, 67.0, 4800, 256),
        _chip("b200", "sm_100", 148, 2250.0, 80.0, 8000, 256),
        _chip("rtx5090", "sm_120", 170, 209.5, 104.8, 1792, 128),
    )
}
# The chip that stands for an architecture where only that is named.
OF_ARCH = {
    "sm_80": "a100",
    "sm_86": "a10",
    "sm_87": "orin",
    "sm_89": "l40s",
    "sm_90": "h100",
    "sm_100": "b200",
    "sm_120": "rtx5090",
}
DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16"}
DTYPES |= {"bfloat16": "bfloat16", "bf16": "bfloat16"}
# What "cuda" alone builds kernels for, and is priced for.
ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100")
DEFAULT_CHIP = "h100"


# Bytes of shared memory that one block may ask for: CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability"; LDS of a workgroup on CDNA.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_87": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
}


@dataclass(frozen=True)
class Wish:
    """What the words after "cuda:" ask for: architectures to build for, the chip to price for, the type to compute in."""

    archs: tuple[str, ...]
    chip: Chip
    dtype: str


def read_wish(words: str | None) -> Wish:
    """The meaning of "sm_90", "orin", "h100,bf16", "sm_80,sm_90": chips or architectures, and at most one type.

    Raises:
        ConfigError: a word that is neither, or two types.
    """
    found: list[Chip] = []
    dtypes: list[str] = []
    for word in (words or "").lower().split(",") if words else []:
        word = word.strip()
        if word in DTYPES:
            dtypes.append(DTYPES[word])
        elif word in CHIPS or word in OF_ARCH:
            found.append(CHIPS[OF_ARCH.get(word, word)])
        else:
            raise ConfigError(
                "target",
                "the cuda target knows no such chip or type",
                got=f"cuda:{words}",
                wanted=", ".join([*CHIPS, *OF_ARCH, *DTYPES]),
                fix='e.g. "cuda", "cuda:sm_90", "cuda:orin,fp16"',
            )
    if len(set(dtypes)) > 1:
        raise ConfigError("target", "two types to compute in", got=f"cuda:{words}", wanted="one of them")
    archs = tuple(dict.fromkeys(chip.arch for chip in found)) or ARCHS
    return Wish(archs, found[0] if found else CHIPS[DEFAULT_CHIP], dtypes[0] if dtypes else "float32")
