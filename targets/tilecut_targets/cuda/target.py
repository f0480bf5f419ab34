"""target="cuda": a program in which every attention is one `tilecut::attention`, and the kernels that it launches.

The artifact holds the device-neutral program (`model.pt2`), its weights, and cubins of the attention kernels for the
architectures that were asked for ("cuda" alone: all of `ARCHS`); `tilecut build` adds PyTorch's native package on a
machine with a GPU. The words behind "cuda:" name architectures or chips, and the type to compute in: "cuda:sm_90",
"cuda:orin,fp16". With `load(path, device="cpu")` the op is plain torch, which is what is verified without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_passes.search import Lattice
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.load_cubins import KERNELS, Cubin, read_kernels
from tilecut_runtime.manifest import Manifest, Rung
from tilecut_runtime.reference import Case
from tilecut_runtime.torch_program import open_program, save_program
from tilecut_targets.compute_in import ComputeIn
from tilecut_targets.cost_model import CostModel
from tilecut_targets.cuda.chips import SHARED_LIMIT, Wish, read_wish
from tilecut_targets.cuda.wave_model import wave_model
from tilecut_targets.export_program import export_program
from tilecut_targets.target import Target, Written, count_attentions, rung

MODEL = "model.pt2"
INSTALL = "pip install 'tilecut[cuda]' (on Linux)"
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class CudaTarget(Target):
    """Tensor cores: FFN widths in multiples of 64, head widths in multiples of 8, any number of heads."""

    name = "cuda"
    runtime = "torch"
    block = 64
    head_width = 8
    packed = True
    exported = True

    def __post_init__(self) -> None:
        read_wish(self.chip)

    @property
    def wish(self) -> Wish:
        """Architectures, chip and type."""
        return read_wish(self.chip)

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """Of the type to compute in."""
        return TOLERANCE[self.wish.dtype]

    @property
    def rounds(self) -> bool:
        """In 16 bits."""
        return self.wish.dtype != "float32"

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """The program calls the op itself; only the type of its numbers may change."""
        return (ComputeIn(getattr(torch, self.wish.dtype)),) if self.rounds else ()

    def write(self, fused: Graph, lowered: Graph, folder: Path) -> Written:
        """model.pt2 without weights (they are in model.safetensors beside it), and the kernels."""
        try:
            from tilecut_targets.cuda.build_cubins import build_cubins
        except ModuleNotFoundError as e:
            if e.name != "triton":
                raise
            raise ConfigError("cuda", "the kernels are built by triton, which is not installed", fix=INSTALL) from e
        save_program(export_program(lowered), folder / MODEL)
        cubins = build_cubins(lowered, self.wish.archs, folder)
        count = count_attentions(lowered)
        entry = {"model": MODEL, **({"kernels": KERNELS} if cubins else {})}
        facts = {"fused_attention": count, "attention": count, "dtype": self.wish.dtype, "kernels": summary(cubins)}
        return Written(entry, facts)

    def cost(
        self,
        dense: Graph,
        axes: Axes,
        groups: Sequence[Group],
        sets: Sequence[Sequence[str]],
        at: Mapping[str, int],
        lattice: Lattice,
        folder: Path | None,
        progress: Callable[[int, int], None],
    ) -> CostModel:
        """Calculated from waves of tiles and bytes; see `wave_model`."""
        wish = self.wish
        return wave_model(axes, groups, sets, at, lambda g: self.emitted_sizes(lattice, g), wish.chip, wish.dtype)

    def verify(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The reloaded program on the CPU against the pruned torch model."""
        program = open_program(folder, manifest, "model")
        worst = 0.0
        with torch.no_grad():
            for case in cases:
                out = program(**{k: torch.from_numpy(v) for k, v in case.inputs.items()})
                worst = max(worst, case.error({k: v.numpy() for k, v in out.items()}))
        return [
            rung(
                "artifact equals pruned model",
                worst,
                self.tolerance,
                "the reloaded program on the CPU, through the reference attention, against torch",
            ),
            _check_kernels(folder, manifest),
            Rung("CUDA device", "not run", "needs an NVIDIA GPU: tilecut verify --device cuda on a machine with one"),
        ]


def _check_kernels(folder: Path, manifest: Manifest) -> Rung:
    """Every cubin fits its architecture's shared memory; those that spill registers are counted."""
    if KERNELS not in manifest.files:
        return Rung("kernels fit", "not run", "the program calls no attention")
    _, cubins = read_kernels(folder, manifest)
    over = sum(one.shared_bytes > SHARED_LIMIT.get(one.arch, 0) for one in cubins)
    spilled = sum(one.spills > 0 for one in cubins)
    detail = f"{len(cubins)} cubins for {', '.join(dict.fromkeys(c.arch for c in cubins))}: shared memory within the"
    return rung("kernels fit", over, 0, f"{detail} architecture's limit; {spilled} spill registers")


def summary(cubins: Sequence[Cubin]) -> list[dict[str, object]]:
    """What the report says of the kernels."""
    names = ("arch", "kernel", "dtype", "width", "tile", "shared_bytes", "registers", "spills")
    rows = [{name: getattr(one, name) for name in names} for one in cubins]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]
