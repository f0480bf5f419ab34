"""target="cuda": a device-neutral exported program in which every attention is one `tilecut::attention`.

The artifact holds the program, its plan and its weights; kernels are compiled where it runs, by Triton. On a CUDA device
the op launches the kernels of `tilecut_runtime.kernels`; with `load(path, device="cpu")` it is plain torch, which is what
is verified here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.manifest import Manifest, Rung
from tilecut_runtime.reference import Case
from tilecut_runtime.torch_program import open_program, save_program
from tilecut_targets.export_program import export_program
from tilecut_targets.target import Target, Written, count_attentions, rung

MODEL = "model.pt2"


@dataclass(frozen=True)
class CudaTarget(Target):
    """Tensor cores: FFN widths in multiples of 64, head widths in multiples of 8, any number of heads."""

    name = "cuda"
    runtime = "torch"
    block = 64
    head_width = 8
    packed = True
    tolerance = 1e-4

    def __post_init__(self) -> None:
        if self.chip is not None:
            raise ConfigError(
                "target", "the cuda target builds nothing per chip yet", got=f"cuda:{self.chip}", wanted="'cuda'"
            )

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """None: the program calls the op itself."""
        return ()

    def write(self, fused: Graph, lowered: Graph, folder: Path) -> Written:
        """model.pt2 without weights; they are in model.safetensors beside it."""
        save_program(export_program(lowered), folder / MODEL)
        count = count_attentions(lowered)
        return Written({"model": MODEL}, {"fused_attention": count, "attention": count})

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
            Rung("CUDA device", "not run", "needs an NVIDIA GPU: tilecut verify --device cuda on a machine with one"),
        ]
