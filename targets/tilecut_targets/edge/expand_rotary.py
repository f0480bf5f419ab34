"""Give RotaryEmbedding tables of as many rows as its input, which standard ONNX (opset 23) asks for.

Before: RotaryEmbedding(x [B, H, S, D], cos [1, S, D/2], sin [1, S, D/2]), as torch's exporter writes it: right for one row,
and refused by onnxruntime for more. After: the tables are expanded to [B, S, D/2], once for all nodes that share them.
Left alone: nodes with position ids, whose tables have no rows.
"""

from __future__ import annotations

import onnx_ir as ir


def expand_rotary(model: ir.Model) -> int:
    """Rewrite in place; returns the number of nodes."""
    made: dict[tuple[str | None, str], ir.Value] = {}
    count = 0
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain != "":
            continue
        x, cos, sin, *ids = node.inputs
        assert x is not None and cos is not None and sin is not None
        if any(one is not None for one in ids):
            continue
        rows = str(x.shape[0]) if x.shape is not None else x.name
        for i, table in ((1, cos), (2, sin)):
            key = (table.name, str(rows))
            if key not in made:
                made[key] = _expanded(model.graph, node, x, table)
            node.replace_input_with(i, made[key])
        count += 1
    return count


def _expanded(graph: ir.Graph, before: ir.Node, x: ir.Value, table: ir.Value) -> ir.Value:
    """`table` with as many rows as x."""
    rows = ir.node("Shape", [x], {"start": 0, "end": 1})
    rest = ir.node("Shape", [table], {"start": 1})
    shape = ir.node("Concat", [rows.outputs[0], rest.outputs[0]], {"axis": 0})
    wide = ir.node("Expand", [table, shape.outputs[0]])
    for part, one in (("rows", rows), ("rest", rest), ("shape", shape), ("wide", wide)):
        one.name = one.outputs[0].name = f"{table.name}_{x.name}_{part}"
    graph.insert_before(before, [rows, rest, shape, wide])
    return wide.outputs[0]
