"""target="ascend": ONNX with CANN's fused attention for ATC, and a verify twin of it that onnxruntime runs anywhere.

This is the target's first slice: PromptFlashAttention on the Atlas A2 (Ascend 910B), fp16 inside the op. What needs
CANN or an NPU is reported "not run".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.manifest import Manifest, Rung
from tilecut_runtime.reference import Case
from tilecut_runtime.session import onnx_runner
from tilecut_targets.ascend import npu_ops
from tilecut_targets.ascend.lower_attention import LowerAttention
from tilecut_targets.check_onnx import check_onnx
from tilecut_targets.decompose_attention import decomposed_attention
from tilecut_targets.target import Target, Written, count_attentions, rung
from tilecut_targets.unpack_attention import UnpackAttention
from tilecut_targets.write_onnx import write_onnx

ATC_MODEL, VERIFY_MODEL, WEIGHTS = "graph/model_atc.onnx", "graph/verify.onnx", "graph/weights.bin"
CHIPS = ("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4")


@dataclass(frozen=True)
class AscendTarget(Target):
    """The cube works on 16 x 16 fractals: head widths in multiples of 16, FFN widths in multiples of 128."""

    name = "ascend"
    runtime = "ascend"
    block = 128
    head_width = 16
    # fp16 inside the attention.
    tolerance = 2e-3

    def __post_init__(self) -> None:
        if self.chip is not None and self.chip not in CHIPS:
            raise ConfigError("target", "unknown Ascend chip", got=repr(self.chip), wanted=" or ".join(CHIPS))

    @property
    def soc(self) -> str:
        """ATC's soc_version."""
        return self.chip or "Ascend910B3"

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """CANN's fused attention."""
        return (UnpackAttention(), LowerAttention())

    def write(self, fused: Graph, lowered: Graph, folder: Path) -> Written:
        """The file for ATC and its twin with a model-local function; both read the weights beside them."""
        (folder / "graph").mkdir()
        write_onnx(
            lowered,
            folder / ATC_MODEL,
            npu_ops.ONNX_OPSET,
            {
                torch.ops.tilecut.attention.default: decomposed_attention,
                torch.ops.aten.gelu.default: npu_ops.gelu,
            },
            external=Path(WEIGHTS).name,
        )
        model = onnx.load(str(folder / ATC_MODEL), load_external_data=False)
        fused_nodes = [n for n in model.graph.node if n.domain == npu_ops.DOMAIN]
        if fused_nodes:
            model.functions.append(npu_ops.reference_function(has_mask=len(fused_nodes[0].input) > 3))
        onnx.save(model, str(folder / VERIFY_MODEL))
        facts = {
            "soc": self.soc,
            "fused_attention": len(fused_nodes),
            "attention": count_attentions(fused),
            "onnx_nodes": len(model.graph.node),
        }
        return Written({"model": ATC_MODEL, "verify": VERIFY_MODEL, "weights": WEIGHTS}, facts)

    def verify(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The verify twin in onnxruntime against the pruned torch model; what needs CANN is said to be not run."""
        checked = check_onnx(folder, VERIFY_MODEL)
        run = onnx_runner(folder, manifest, "verify", None)
        names = [spec.name for spec in manifest.outputs]
        error = max(case.error(dict(zip(names, run(case.inputs)))) for case in cases)
        return [
            checked,
            rung(
                "verify twin equals pruned model",
                error,
                self.tolerance,
                "onnxruntime runs the file for ATC with the attention's meaning as a local function",
            ),
            Rung(
                "atc",
                "not run",
                f"needs CANN: atc --model={ATC_MODEL} --framework=5 --soc_version={self.soc} --output=model",
            ),
            Rung("NPU", "not run", "needs an Ascend NPU: run the .om on ref/ and compare"),
        ]
