"""target="ascend": ONNX with CANN's fused attention for ATC, a verify twin of it that onnxruntime runs anywhere, and the
script that builds it on a machine with CANN.

The words behind "ascend:" name a chip and the type of the file: "ascend:Ascend310P3", "ascend:Ascend910B3,fp16"; "fused"
makes it an error when an attention is beyond the chip's fused op. What that op takes is the legality table's (`legality.py`).
What needs CANN or an NPU is reported "not run".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.fuse_rms_norm import FuseRmsNorm
from tilecut_passes.fuse_rotary import FuseRotary
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_passes.search import Lattice
from tilecut_runtime.errors import ConfigError, LoweringError
from tilecut_runtime.manifest import Manifest, Rung
from tilecut_runtime.reference import Case
from tilecut_runtime.session import onnx_runner
from tilecut_targets.ascend import npu_norms, npu_ops
from tilecut_targets.ascend.build_kernels import FAMILIES, check_kernels, compile_kernels
from tilecut_targets.ascend.build_script import SCRIPT, write_build_script
from tilecut_targets.ascend.chips import CHIPS, DEFAULT_SOC, Chip, Wish, read_wish
from tilecut_targets.ascend.environments import INSTALL, is_installed
from tilecut_targets.ascend.fractal_model import fractal_model
from tilecut_targets.ascend.legality import family_row, fuses
from tilecut_targets.ascend.lower_attention import LowerAttention
from tilecut_targets.ascend.lower_rms_norm import LowerRmsNorm
from tilecut_targets.ascend.lower_rotary import LowerRotary
from tilecut_targets.ascend.make_twin import fused_nodes, illegal, make_twin
from tilecut_targets.ascend.write_air import AIR as AIR_MODEL
from tilecut_targets.ascend.write_air import check_air, write_air
from tilecut_targets.check_onnx import check_onnx
from tilecut_targets.compute_in import ComputeIn
from tilecut_targets.cost_model import CostModel
from tilecut_targets.decompose_attention import decomposed_attention
from tilecut_targets.decompose_norms import decomposed_rms_norm, decomposed_rotary
from tilecut_targets.fold_casts import FoldCasts
from tilecut_targets.target import Target, Written, count_attentions, rung
from tilecut_targets.unpack_attention import UnpackAttention
from tilecut_targets.write_onnx import write_onnx

ATC_MODEL, VERIFY_MODEL, WEIGHTS = "graph/model_atc.onnx", "graph/verify.onnx", "graph/weights.bin"
# The private environments.
KERNELS, AIR = "ascend-kernels", "ascend-air"
# All in fp32; fp16 inside the attention; all products in fp16.
TOLERANCE_SINGLE, TOLERANCE_FUSED, TOLERANCE_HALF = 1e-4, 2e-3, 1e-2


@dataclass(frozen=True)
class AscendTarget(Target):
    """The cube works on 16 x 16 fractals: head widths in multiples of 16, FFN widths in multiples of 128."""

    name = "ascend"
    runtime = "ascend"
    block = 128
    head_width = 16

    def __post_init__(self) -> None:
        wish = self.wish
        held = family_row(wish.chip.family)
        if wish.dtype not in held["cube"] and wish.dtype != "float32":
            raise ConfigError(
                "target",
                f"the cube of {held['products']} has no {wish.dtype}",
                got=f"ascend:{self.chip}",
                wanted=" or ".join(held["cube"]),
                fix=f'the nearest is "ascend:{wish.chip.soc},fp16"',
            )
        if wish.dtype == "bfloat16":
            raise ConfigError(
                "target",
                "the ONNX file for ATC is written in float32 or float16",
                got=f"ascend:{self.chip}",
                wanted="fp32 or fp16",
                fix=f'the nearest is "ascend:{wish.chip.soc},fp16"',
            )
        if wish.fused and self._fused_in is None:
            raise ConfigError(
                "target",
                f"{held['products']} have no fused attention",
                got=f"ascend:{self.chip}",
                wanted="a chip that has one, or MatMul and Softmax",
                fix=f'leave "fused" out, or the nearest is "ascend:{CHIPS[DEFAULT_SOC].soc},fused"',
            )

    @property
    def _fused_in(self) -> str | None:
        """The container that holds the chip's fused attention."""
        return next((container for container in ("onnx", "air") if fuses(self.npu.family, container)), None)

    @property
    def wish(self) -> Wish:
        """Chip and type."""
        return read_wish(self.chip)

    @property
    def npu(self) -> Chip:
        """The chip."""
        return self.wish.chip

    @property
    def soc(self) -> str:
        """ATC's soc_version."""
        return self.npu.soc

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """Of what is computed in fp16."""
        if self.wish.dtype == "float16":
            return TOLERANCE_HALF
        return TOLERANCE_FUSED if fuses(self.npu.family, "onnx") else TOLERANCE_SINGLE

    @property
    def fusions(self) -> tuple[Pass, ...]:
        """Norms and rotary embeddings, on every chip: what has no op is written out again."""
        return (FuseRmsNorm(), FuseRotary())

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """CANN's fused ops, in the type that was asked for."""
        half: tuple[Pass, ...] = (ComputeIn(torch.float16), FoldCasts()) if self.wish.dtype == "float16" else ()
        family, required = self.npu.family, self._fused_in if self.wish.fused else None
        return (UnpackAttention(), *half, LowerRmsNorm(family), LowerRotary(family), LowerAttention(family, required))

    def write(self, fused: Graph, lowered: Graph, folder: Path) -> Written:
        """The file for ATC, its twin with model-local functions, the weights of both, and what builds them."""
        (folder / "graph").mkdir()
        write_onnx(
            lowered,
            folder / ATC_MODEL,
            npu_ops.ONNX_OPSET,
            {
                torch.ops.tilecut.attention.default: decomposed_attention,
                torch.ops.tilecut.rotary.default: decomposed_rotary,
                torch.ops.aten.rms_norm.default: decomposed_rms_norm,
                torch.ops.aten.gelu.default: npu_ops.gelu,
            },
            external=Path(WEIGHTS).name,
        )
        model = onnx.load(str(folder / ATC_MODEL), load_external_data=False)
        onnx.save(make_twin(model), str(folder / VERIFY_MODEL))
        write_build_script(folder, self.npu)
        entry = {"model": ATC_MODEL, "verify": VERIFY_MODEL, "weights": WEIGHTS, "build": SCRIPT}
        facts = {
            "soc": self.soc,
            "family": self.npu.family,
            "dtype": self.wish.dtype,
            "fused_attention": sum(npu_ops.is_fused(n) for n in model.graph.node),
            "attention": count_attentions(fused),
            "fused_norms": sum(npu_norms.is_norm(n) for n in model.graph.node),
            "fused_rotary": sum(npu_norms.is_rotary(n) for n in model.graph.node),
            "onnx_nodes": len(model.graph.node),
            **self._write_private(fused, folder),
        }
        return Written(entry, facts)

    def _write_private(self, fused: Graph, folder: Path) -> dict[str, object]:
        """What the private environments make, where they are installed and the chip takes it; facts, or why not."""
        facts: dict[str, object] = {}
        for name, makes, family_has, write in (
            (KERNELS, "kernels", self.npu.family in FAMILIES, compile_kernels),
            (AIR, "air", fuses(self.npu.family, "air"), write_air),
        ):
            if not family_has:
                facts[makes] = {"not written": f"nothing of it is for {self.soc}"}
            elif not is_installed(name):
                facts[makes] = {"not written": f"needs the private environment: {INSTALL}"}
            else:
                # The ONNX file stands without it: the report says why it is not there.
                try:
                    facts[makes] = write(fused, self.npu, folder)
                except LoweringError as e:
                    facts[makes] = {"not written": str(e)}
        return facts

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
        """Calculated from fractals, waves of tiles and bytes; see `fractal_model`."""
        legal = lambda group: self.emitted_sizes(lattice, group)
        return fractal_model(axes, groups, sets, at, legal, self.npu, self.wish.dtype)

    def verify(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The verify twin in onnxruntime against the pruned torch model; what needs CANN is said to be not run."""
        checked = check_onnx(folder, VERIFY_MODEL)
        run = onnx_runner(folder, manifest, "verify", None)
        names = [spec.name for spec in manifest.outputs]
        error = max(case.error(dict(zip(names, run(case.inputs)))) for case in cases)
        return [
            self._check_legality(folder),
            checked,
            rung(
                "verify twin equals pruned model",
                error,
                self.tolerance,
                "onnxruntime runs the file for ATC with the fused ops' meaning as local functions",
            ),
            *self._verify_private(folder, manifest, cases),
            Rung("CANN", "not run", f"needs CANN's atc: ./{SCRIPT} --no-run builds the model for {self.soc}"),
            Rung("NPU", "not run", f"needs an Ascend NPU: ./{SCRIPT} runs the built model on ref/ and compares"),
        ]

    def _verify_private(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The rungs of the GE model and of the kernels; one that says what is missing where they were not written."""
        rungs = []
        for makes, has, family_has, check in (
            ("GE model", (folder / AIR_MODEL).is_file(), fuses(self.npu.family, "air"), self._check_air),
            ("kernels", (folder / "kernels").is_dir(), self.npu.family in FAMILIES, self._check_kernels),
        ):
            if has:
                # What a check cannot judge is no fault of the artifact's.
                try:
                    rungs += check(folder, manifest, cases)
                except LoweringError as e:
                    rungs.append(Rung(makes, "not run", f"cannot be checked here: {e}"))
            elif family_has:
                rungs.append(Rung(makes, "not run", f"was not written; see the report, or {INSTALL} and compile again"))
        return rungs

    def _check_air(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        return check_air(folder, manifest, cases)

    def _check_kernels(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        return check_kernels(folder)

    def _check_legality(self, folder: Path) -> Rung:
        """Every fused node of the file for ATC against the chip's row of the table, and whether the twin is that file's."""
        model, twin = (onnx.load(str(folder / name), load_external_data=False) for name in (ATC_MODEL, VERIFY_MODEL))
        found = fused_nodes(model)
        broken = [reason for node in found if (reason := illegal(node, self.npu.family)) is not None]
        # What the twin shows is true of another file; a forbidden node may have no function at all.
        if not broken and make_twin(model) != twin:
            broken.append(f"{VERIFY_MODEL} is no twin of {ATC_MODEL}")
        counts = [sum(map(kind, found)) for kind in (npu_ops.is_fused, npu_norms.is_norm, npu_norms.is_rotary)]
        what = "{} fused attentions, {} norms and {} rotary embeddings".format(*counts)
        detail = f"{what} against the table for {self.soc} ({self.npu.family})"
        return rung("legality table", len(broken), 0, "; ".join([detail, *broken]))
