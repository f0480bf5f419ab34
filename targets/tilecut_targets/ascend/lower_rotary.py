"""Lower `tilecut::rotary` to CANN's rotary embedding where the chip's row of the legality table allows it.

Before: tilecut::rotary(x [B, N, S, D], cos, sin [B|1, 1, S, D]), or x [B, S, N, D], cos, sin [B|1, S, 1, D]. After, always in
the second layout (BSND), which has no limit on short sequences: npu::NPURotaryPositionEmbedding for the ONNX file,
torch.ops.npu.npu_rotary_mul for the program of torch_npu and the GE model. x's own transpose from that layout goes, and
the one back stands behind the op, where LowerInferAttention can take it. Tables are transposed once.
Left alone, to be written out by whoever exports; once for each reason in `graph.refusals`: what
`legal_norms.choose_rotary` says, and tables that differ from head to head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilecut_passes.fuse_rotary import dimension_of_heads
from tilecut_passes.graph import (
    CASTS,
    Graph,
    arguments,
    calls_before,
    is_call,
    size_of,
    sizes_of,
    source,
    swaps_heads,
    value_of,
)
from tilecut_runtime.npu_norms import ROTARY_MUL
from tilecut_targets.ascend import npu_norms
from tilecut_targets.ascend.legal_norms import FusedRotary, RotaryShape, choose_rotary
from tilecut_targets.ascend.legality import Refused
from tilecut_targets.ascend.lower_rms_norm import refusals

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerRotary:
    """Every rotary embedding within the limits of a family of chips becomes one op of a container, "onnx" or "air"."""

    family: str = "a2"
    container: str = "onnx"

    def match(self, node: fx.Node) -> FusedRotary | Refused:
        """The op and its mode, or the limit that the embedding breaks."""
        x = value_of(source(node))
        cos, sin = (sizes_of(value_of(source(node, i))) for i in (1, 2))
        heads = dimension_of_heads(node)
        if heads is None or cos != sin:
            return Refused("tables are those of all heads", f"cos {cos}, sin {sin}", "written out it is exact")
        batch = size_of(x.shape[0])
        wanted = RotaryShape(
            dtype=str(x.dtype).removeprefix("torch."),
            width=int(x.shape[3]),
            heads=int(x.shape[heads]),
            batch=batch if isinstance(batch, int) else None,
            interleaved=bool(node.kwargs["interleaved"]),
            shared=cos[0] == 1,
        )
        return choose_rotary(self.family, self.container, wanted)

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of embeddings."""
        count = 0
        refused: dict[str, list[str]] = {}
        flat: dict[fx.Node, fx.Node] = {}
        for node in [n for n in graph.nodes if is_call(n, torch.ops.tilecut.rotary.default)]:
            found = self.match(node)
            if isinstance(found, Refused):
                refused.setdefault(str(found), []).append(node.name)
                continue
            op = npu_norms.rotary if self.container == "onnx" else fused_rotary
            a = arguments(node)
            with calls_before(graph, node) as call:
                if dimension_of_heads(node) == 2:
                    made = call(op, a["x"], a["cos"], a["sin"], found.mode, found.expand)
                else:
                    x, cos, sin = (_transposed(call, a[name], flat) for name in ("x", "cos", "sin"))
                    made = call(aten.transpose.int, call(op, x, cos, sin, found.mode, found.expand), 1, 2)
            node.replace_all_uses_with(made)
            graph.fx.erase_node(node)
            count += 1
        graph.refusals += refusals("LowerRotary", refused)
        return count


def _transposed(call: Callable[..., fx.Node], node: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """A node in the other layout: what it was transposed from, casts and slices of the width done there; else its transpose.

    It is made once.
    """
    if swaps_heads(node):
        return source(node)
    if node not in made:
        if _was_transposed(node):
            inner = _transposed(call, source(node), made)
            made[node] = call(node.target, inner, *node.args[1:], **node.kwargs)
        else:
            made[node] = call(aten.transpose.int, node, 1, 2)
    return made[node]


def _was_transposed(node: fx.Node) -> bool:
    """Whether only casts and slices of the last dimension stand between a node and its transpose."""
    moves = is_call(node, *CASTS) or (is_call(node, aten.slice.Tensor) and arguments(node)["dim"] in (3, -1))
    return swaps_heads(node) or (moves and _was_transposed(source(node)))


def fused_rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str, expand: bool) -> Tensor:
    """torch_npu's rotary embedding of x [B, S, N, D]."""
    cos, sin = npu_norms.repeated(x, cos, sin) if expand else (cos, sin)
    return ROTARY_MUL(x, cos, sin, mode)
