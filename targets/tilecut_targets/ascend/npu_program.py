"""An exported program for torch_npu: every attention calls `torch.ops.npu.npu_fused_infer_attention_score`.

The version without a suffix: every torch_npu that runs on torch 2.x has it, `_v2` adds quantization and becomes the same
operator of CANN, FusedInferAttentionScore. Written as the cuda target's program is: a graph without weights, which lie in
`model.safetensors` beside it, and no pickle. Where torch_npu is not installed, `tilecut_runtime.npu_attention` knows the
op, so that the program is written, read and executed anywhere.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.npu_attention import OP
from tilecut_runtime.torch_program import save_program
from tilecut_targets.ascend.lower_infer_attention import LowerInferAttention
from tilecut_targets.decompose_attention import decomposed_attention
from tilecut_targets.export_program import export_program
from tilecut_targets.unpack_attention import UnpackAttention

NPU_PROGRAM = "graph/model_npu.pt2"
ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default)


def npu_program(fused: Graph, family: str = "a2") -> tuple[ExportedProgram, Graph]:
    """The program of a fused graph for a family of chips, and the lowered graph, whose `refusals` say what became MatMul
    and Softmax.

    Raises:
        LoweringError: an attention that neither the op nor MatMul and Softmax can express, or torch.export refuses.
    """
    lowered = fused.copy()
    run_passes(lowered, [UnpackAttention(), LowerInferAttention(family)])
    program = export_program(lowered)
    program = program.run_decompositions({torch.ops.tilecut.attention.default: decomposed_attention})
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
        "npu_attention": sum(n.target is OP for n in program.graph.nodes),
        "npu_refusals": [f"{one.node}: {one.why}" for one in lowered.refusals[len(fused.refusals) :]],
    }
