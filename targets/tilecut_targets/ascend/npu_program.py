"""An exported program for torch_npu: attention calls `torch.ops.npu.npu_fused_infer_attention_score`, norms and rotary
embeddings call `npu_rms_norm` and `npu_rotary_mul`.

The attention without a suffix: every torch_npu that runs on torch 2.x has it, `_v2` adds quantization and becomes the same
operator of CANN, FusedInferAttentionScore. Written as the cuda target's program is: a graph without weights, which lie in
`model.safetensors` beside it, and no pickle. Where torch_npu is not installed, `tilecut_runtime.npu_attention` and `npu_norms`
know the ops, so that the program is written, read and executed anywhere.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.npu_attention import OP
from tilecut_runtime.npu_norms import RMS_NORM, ROTARY_MUL
from tilecut_runtime.torch_program import save_program
from tilecut_targets.ascend.lower_infer_attention import LowerInferAttention
from tilecut_targets.ascend.lower_rms_norm import LowerRmsNorm
from tilecut_targets.ascend.lower_rotary import LowerRotary
from tilecut_targets.decompose_attention import decomposed_attention
from tilecut_targets.decompose_norms import decomposed_rms_norm, decomposed_rotary
from tilecut_targets.export_program import export_program
from tilecut_targets.unpack_attention import UnpackAttention

NPU_PROGRAM = "graph/model_npu.pt2"
ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default)


def npu_program(fused: Graph, family: str = "a2") -> tuple[ExportedProgram, Graph]:
    """The program of a fused graph for a family of chips, and the lowered graph, whose `refusals` say what is
    written out.

    Raises:
        LoweringError: an attention that neither the op nor MatMul and Softmax can express, or torch.export refuses.
    """
    lowered = fused.copy()
    # Rotary embeddings before the attention, whose layout follows from theirs.
    norms = (LowerRmsNorm(family, "air"), LowerRotary(family, "air"))
    run_passes(lowered, [UnpackAttention(), *norms, LowerInferAttention(family)])
    program = export_program(lowered)
    program = program.run_decompositions(
        {
            torch.ops.tilecut.attention.default: decomposed_attention,
            torch.ops.tilecut.rotary.default: decomposed_rotary,
            torch.ops.aten.rms_norm.default: decomposed_rms_norm,
        }
    )
    _drop_assertions(program)
    return program, lowered


def _drop_assertions(program: ExportedProgram) -> None:
    """torch.export asserts the device of what is cast, the CPU, and relations of sizes; CANN has no operator for either."""
    for node in list(program.graph.nodes):
        if node.target in ASSERTIONS:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def write_npu_program(fused: Graph, folder: Path, family: str = "a2") -> dict[str, object]:
    """Write `graph/model_npu.pt2` into the artifact; returns facts for the report."""
    program, lowered = npu_program(fused, family)
    (folder / NPU_PROGRAM).parent.mkdir(exist_ok=True)
    save_program(program, folder / NPU_PROGRAM)
    return {
        **{
            name: sum(n.target is op for n in program.graph.nodes)
            for name, op in (("npu_attention", OP), ("npu_norms", RMS_NORM), ("npu_rotary", ROTARY_MUL))
        },
        "npu_refusals": [f"{one.node}: {one.why}" for one in lowered.refusals[len(fused.refusals) :]],
    }
