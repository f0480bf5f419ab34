"""One form of the attention kernel, lowered and planned for a chip, in the private environment.

Variant -> TTIR -> linalg MLIR -> memory-planned HIVM MLIR, all in one folder
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from tilecut_runtime.errors import LoweringError
from tilecut_targets.ascend.environments import SCRIPTS, call
from tilecut_targets.ascend.read_plan import Memory, read_plan, read_retries

SOURCE = Path(__file__).with_name("kernels") / "attention_forward.py"
KERNEL = "attention_forward"
ENVIRONMENT = "ascend-kernels"
LINALG, PLAN = "kernel.ttadapter.mlir", "kernel.hivm.mlir"
TYPES = {"float16": "fp16", "bfloat16": "bf16"}
# Seconds; the slowest tile that was measured took 18.
TIMEOUT = 300.0


class Chip(Protocol):
    """What planning needs to know of a chip."""

    @property
    def soc(self) -> str:
        """bishengir-compile's --target."""
        ...

    @property
    def family(self) -> str:
        """a2, a3 or a950."""
        ...


class Tile(NamedTuple):
    """Queries by keys of one step."""

    block_m: int
    block_n: int


@dataclass(frozen=True)
class Variant:
    """What an attention fixes in the kernel's code; batch, heads and lengths are arguments.

    width, value_width: of q and k, and of v. causal: "none", "top_left" or "bottom_right". left, right: the window, -1
    unbounded. tail: lengths need not be multiples of the tile.
    """

    width: int
    value_width: int
    dtype: str = "float16"
    causal: str = "none"
    left: int = -1
    right: int = -1
    padding: bool = False
    tail: bool = True

    @property
    def name(self) -> str:
        """A folder's name: attention_d64_bottom_right_padding."""
        widths = f"d{self.width}" if self.width == self.value_width else f"d{self.width}_e{self.value_width}"
        parts = ["attention", widths]
        if self.dtype != "float16":
            parts.append(TYPES[self.dtype])
        if self.causal != "none":
            parts.append(self.causal)
        if self.left >= 0 or self.right >= 0:
            parts.append("window" + "".join(f"_{'all' if n < 0 else n}" for n in (self.left, self.right)))
        if self.padding:
            parts.append("padding")
        if not self.tail:
            parts.append("whole")
        return "_".join(parts)

    @property
    def mask(self) -> str:
        """Which row of the table of tiles it takes: what is masked decides what the vector cores must hold."""
        band = self.causal != "none" or self.left >= 0 or self.right >= 0
        return "+".join(["causal" if band else "full", *["tail"] * self.tail, *["padding"] * self.padding])

    def signature(self) -> dict[str, str]:
        """Triton's types of the kernel's arguments that are no constants, in order."""
        pointer = f"*{TYPES[self.dtype]}"
        padding = {"KeyPadding": "*i8"} if self.padding else {}
        sizes = dict.fromkeys(("batch", "heads", "kv_heads", "nq", "nk"), "i32")
        return {**dict.fromkeys("QKV", pointer), **padding, "Out": pointer, "scale": "fp32", **sizes}

    def constants(self, tile: Tile) -> dict[str, object]:
        """The kernel's constants."""
        return {
            **({} if self.padding else {"KeyPadding": None}),
            "D": self.width,
            "E": self.value_width,
            "CAUSAL": self.causal != "none",
            "TOP_LEFT": self.causal == "top_left",
            "LEFT": self.left,
            "RIGHT": self.right,
            "TAIL": self.tail,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }


@dataclass(frozen=True)
class Planned:
    """A plan that fits, by the compiler's word; `retries` is what it switched off to get there."""

    variant: Variant
    tile: Tile
    memories: dict[str, Memory]
    retries: tuple[str, ...]

    @property
    def degraded(self) -> bool:
        """Whether a smaller tile would keep what was switched off."""
        return bool(self.retries)


def compiler_options(chip: Chip) -> list[str]:
    """bishengir-compile's options, as triton-ascend gives them for the chip."""
    if chip.family == "a950":
        own = ["--enable-auto-multi-buffer=false", "--enable-auto-bind-sub-block=false"]
    else:
        own = ["--enable-auto-multi-buffer=true", "--enable-auto-bind-sub-block=true", "--enable-hivm-compile=true"]
    return [f"--target={chip.soc}", *own, "--enable-hfusion-compile=true", "--enable-triton-kernel-compile=true"]


def plan_kernel(variant: Variant, tile: Tile, chip: Chip, folder: Path) -> Planned | None:
    """Write kernel.ttir, kernel.ttadapter.mlir and kernel.hivm.mlir; None where the tile does not fit the chip.

    Raises:
        ConfigError: the private environment is not installed.
        LoweringError: anything else than a memory that is too small stood in the way.
    """
    request = {
        "source": str(SOURCE),
        "kernel": KERNEL,
        "signature": variant.signature(),
        "constants": variant.constants(tile),
        "chip": chip.soc,
        "family": chip.family,
        "folder": str(folder),
        "options": compiler_options(chip),
    }
    answer = call(ENVIRONMENT, SCRIPTS / "lower_kernel.py", request, TIMEOUT)
    messages = answer["messages"]
    if not answer["planned"]:
        if any("overflow, requires" in line for line in messages):
            return None
        raise LoweringError("plan_kernel", f"{variant.name} is not planned", got=" | ".join(messages)[:1000])
    memories = read_plan((folder / PLAN).read_text(encoding="utf-8"))
    return Planned(variant, tile, memories, tuple(read_retries(messages)))
