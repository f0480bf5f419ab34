"""The verify twin: the very file that ATC gets, plus model-local functions for its `npu` nodes, so that onnxruntime runs it.

A node names its function by its `overload`, which only the twin has.
"""

from __future__ import annotations

import onnx

from tilecut_targets.ascend import npu_norms, npu_ops

# An overload is a field of nodes and functions since this version of ONNX's representation.
TWIN_IR = 10


def fused_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that only CANN knows."""
    return [node for node in model.graph.node if node.domain == npu_ops.DOMAIN]


def illegal(node: onnx.NodeProto, family: str) -> str | None:
    """What a fused node breaks of its op's row in the legality table, or None."""
    return npu_ops.illegal(node, family) if npu_ops.is_fused(node) else npu_norms.illegal(node, family)


def make_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model that onnxruntime runs: every fused node names its function, and the functions are in the file."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    found = fused_nodes(twin)
    for node in found:
        node.overload = npu_ops.overload_of(node) if npu_ops.is_fused(node) else npu_norms.overload_of(node)
    if found:
        twin.ir_version = max(twin.ir_version, TWIN_IR)
    twin.functions.extend(_function(*which) for which in sorted({(node.op_type, node.overload) for node in found}))
    return twin


def _function(op: str, overload: str) -> onnx.FunctionProto:
    if op == npu_ops.OP:
        return npu_ops.reference_function(overload)
    return npu_norms.rms_norm_function() if op == npu_norms.RMS_NORM else npu_norms.rotary_function(overload)
