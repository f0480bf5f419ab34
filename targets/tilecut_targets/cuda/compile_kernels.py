"""Compile the attention kernels for GPUs that are not here, and read what came of it out of the binaries.

Before: a kernel, an architecture and the constants of one launch. After: a cubin (NVIDIA) or a code object (AMD), with
the shared memory, registers, spills and matrix instructions that the compiler gave it. ptxas, cuobjdump and nvdisasm
come with triton; no driver and no GPU are needed.

A binary says nothing about speed, and it was not run.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilecut_runtime.errors import ConfigError, LoweringError
from tilecut_runtime.kernels.attention_backward import attention_delta, attention_dkdv, attention_dq
from tilecut_runtime.kernels.attention_decode import attention_combine, attention_decode
from tilecut_runtime.kernels.attention_forward import attention_forward
from tilecut_runtime.kernels.attention_tile import SIZES
from tilecut_runtime.kernels.choose_tile import Tile
from tilecut_runtime.kernels.split_width import split_width
from tilecut_targets.cuda.chips import SHARED_LIMIT

WHERE = "compile_kernels"
AMD_ARCHS = ("gfx90a", "gfx942")
KERNELS = {
    "forward": attention_forward,
    "decode": attention_decode,
    "combine": attention_combine,
    "delta": attention_delta,
    "dq": attention_dq,
    "dkdv": attention_dkdv,
}
# What an argument points to; the type of the tensors where it is not said.
POINTS_TO = {
    **dict.fromkeys(("Lse", "Delta", "Parts", "PartLse", "Slopes", "DBias"), "fp32"),
    **dict.fromkeys(("CuQ", "CuK", "Tiles", "BlockOffsets", "BlockIndices", "BlockBase"), "i32"),
    "KeyPadding": "u8",
    "Seed": "i64",
}
OPTIONAL = (
    "CuQ",
    "CuK",
    "Tiles",
    "KeyPadding",
    "Bias",
    "Slopes",
    "BlockOffsets",
    "BlockIndices",
    "BlockBase",
    "Seed",
    "DBias",
)
# The kernels that multiply matrices, and the instructions that do it.
PRODUCTS = ("forward", "decode", "dq", "dkdv")
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "MFMA")
# What is counted. LDL and STL are spills; matrix products are UTCHMMA on Blackwell, HGMMA on Hopper and HMMA elsewhere,
# with their shape in the name.
INSTRUCTION = re.compile(r"\b(HGMMA|UTCHMMA|HMMA|LDL|STL)\b(?:\.(\d+)x(\d+)x(\d+)|\.(16816|1688))?")


@dataclass(frozen=True)
class Variant:
    """One launch of the kernels: what in it is a constant.

    dtype: "bf16", "fp16" or "fp32". inputs: the optional arguments that are given, of OPTIONAL. width, value_width: D, E.
    """

    width: int
    value_width: int | None = None
    dtype: str = "bf16"
    group: int = 1
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    global_tokens: int = 0
    softcap: float = 0.0
    dropout: float = 0.0
    precision: str = "ieee"
    top_left: bool = False
    inputs: tuple[str, ...] = ()

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Every constexpr that some kernel takes, by name."""
        value_width = self.value_width or self.width
        return {
            "GROUP": self.group,
            "D": self.width,
            "D_CHUNKS": split_width(self.width),
            "E": value_width,
            "E_CHUNKS": split_width(value_width),
            "SCALE": self.width**-0.5,
            "SOFTCAP": self.softcap,
            "CAUSAL": self.causal,
            "TOP_LEFT": self.top_left,
            "LEFT": self.window[0],
            "RIGHT": self.window[1],
            "GLOBAL": self.global_tokens,
            "DROPOUT": self.dropout,
            "PRECISION": self.precision,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "SPLITS": 64,
        }


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    spills: instructions that move registers to or from local memory, or AMD's count of spilled registers.
    matrix_work: multiply-adds of the code's HMMA and HGMMA by all warps, each counted once as it stands there.
    """

    kernel: str
    arch: str
    variant: Variant
    tile: Tile
    code: bytes = field(repr=False)
    shared: int
    registers: int
    spills: int
    matrix_work: int
    instructions: Mapping[str, int]


def compile_kernel(kernel: str, arch: str, variant: Variant, tile: Tile) -> Binary:
    """Compile one kernel of KERNELS for "sm_XX" or "gfxXXX".

    Raises:
        ConfigError: an architecture that is not known, or kernels that were imported for the interpreter.
        LoweringError: a tile that needs more shared memory than a block may have, or that compiles to nothing.
    """
    if arch not in SHARED_LIMIT:
        raise ConfigError(WHERE, "unknown architecture", got=arch, wanted=" or ".join(SHARED_LIMIT))
    function = KERNELS[kernel]
    if not isinstance(function, triton.JITFunction):
        raise ConfigError(WHERE, "the kernels were imported for the interpreter", fix="unset TRITON_INTERPRET")
    amd = arch.startswith("gfx")
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    with knobs.compilation.scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Line tables are two thirds of a cubin.
        knobs.compilation.disable_line_info = True
        compiled: Any = triton.compile(_source(function, variant, tile), target=gpu_target(arch), options=options)
    shared = compiled.metadata.shared
    if shared > SHARED_LIMIT[arch]:
        raise LoweringError(
            WHERE,
            f"{kernel} of width {variant.width} does not fit {arch}",
            got=f"{shared} bytes of shared memory with {tile}",
            wanted=f"at most {SHARED_LIMIT[arch]}",
            fix="a smaller block_n, block_m or num_stages",
        )
    work = 0
    if amd:
        code = compiled.asm["hsaco"]
        registers, spills, instructions = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        code = compiled.asm["cubin"]
        registers, work, instructions = read_cubin(code)
        spills = instructions["LDL"] + instructions["STL"]
    # ptxas answers some tiles that need more tensor memory than Blackwell has with an empty kernel, and no error.
    if kernel in PRODUCTS and variant.dtype != "fp32" and not any(instructions[name] for name in MATRIX):
        raise LoweringError(
            WHERE,
            f"{kernel} of width {variant.width} for {arch} came out without products",
            got=tile,
            fix="a smaller tile",
        )
    return Binary(kernel, arch, variant, tile, code, shared, registers, spills, work * tile.num_warps, instructions)


def gpu_target(arch: str) -> GPUTarget:
    """What triton calls an architecture."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def matrix_work(kernel: str, variant: Variant, tile: Tile) -> int:
    """Multiply-adds of one pass over a tile when widths are padded to 16 and no further."""
    width, value_width = (-(-w // 16) * 16 for w in (variant.width, variant.value_width or variant.width))
    # q k^T and p v; backward recomputes q k^T, has grad v^T, and adds to dq, or to dk and dv.
    depth = {
        "forward": width + value_width,
        "decode": width + value_width,
        "dq": 2 * width + value_width,
        "dkdv": 2 * width + 2 * value_width,
    }[kernel]
    return tile.block_m * tile.block_n * depth


def _source(function: Any, variant: Variant, tile: Tile) -> ASTSource:
    """The kernel with the types of its arguments, as a launch with aligned tensors would specialize it."""
    constants = variant.constants(tile)
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    aligned = []
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in OPTIONAL and name not in variant.inputs:
            signature[name], values[name] = "constexpr", None
        elif name[0].isupper():
            signature[name] = "*" + POINTS_TO.get(name, variant.dtype)
            aligned.append(place)
        elif name == "bias_column":
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if name not in SIZES:
                aligned.append(place)
    attributes: Any = {(place,): [["tt.divisibility", 16]] for place in aligned}
    return ASTSource(function, signature, values, attributes)


def read_cubin(cubin: bytes) -> tuple[int, int, Mapping[str, int]]:
    """(registers, multiply-adds of a warp, counts of instructions) of a cubin, by NVIDIA's tools."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _run(tools / "nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if not registers:
        raise LoweringError(WHERE, "cuobjdump names no registers", got=usage[-300:])
    counts: collections.Counter[str] = collections.Counter()
    work = 0
    for name, rows, columns, depth, shape in INSTRUCTION.findall(sass):
        counts[name] += 1
        if name == "HGMMA":
            # Four warps share one.
            work += int(rows) * int(columns) * int(depth) // 4
        elif shape:
            work += 16 * 8 * int(shape.removeprefix("168"))
    return int(registers[1]), work, counts


def _read_amdgcn(assembly: str) -> tuple[int, int, Mapping[str, int]]:
    """(vector registers, spilled registers, counts of matrix instructions) of AMD assembly with its metadata."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        if not found:
            raise LoweringError(WHERE, f"the assembly does not name {key}")
        return int(found[1])

    counts = collections.Counter({"MFMA": len(re.findall(r"\bv_mfma_", assembly))})
    return number("vgpr_count"), number("vgpr_spill_count"), counts


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoweringError(WHERE, f"{command[0]} failed", got=done.stderr.strip()[-300:])
    return done.stdout
