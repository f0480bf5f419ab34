"""Give heads the widths that onnxruntime's GroupQueryAttention takes: keys and values equally wide, a multiple of 8.

Before: tilecut::attention of q, k [B, H, S, D] and v [B, H, S, E]. After: q, k and v padded with zeros to one width, which
changes no score, and the first E channels of what comes out. Run before a cache is added, so that the cache has that width.
Left alone: heads that have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilecut_passes.graph import Graph, arguments, calls_before, is_call, value_of

aten = torch.ops.aten
ATTENTION = torch.ops.tilecut.attention.default
MULTIPLE = 8


@dataclass(frozen=True)
class PadHeads:
    """Every attention has heads of one width, a multiple of 8."""

    def __call__(self, graph: Graph) -> int:
        """Pad in place; returns the number of attentions."""
        count = 0
        for node in [n for n in graph.nodes if is_call(n, ATTENTION)]:
            a = arguments(node)
            widths = [int(value_of(a[name]).shape[3]) for name in "qkv"]
            wide = -(-max(widths) // MULTIPLE) * MULTIPLE
            if set(widths) == {wide}:
                continue
            with calls_before(graph, node) as call:
                for i, width in enumerate(widths):
                    if width < wide:
                        node.update_arg(i, call(aten.constant_pad_nd.default, node.args[i], [0, wide - width]))
            if widths[2] < wide:
                made = value_of(node)
                node.meta["val"] = made.new_empty((*made.shape[:3], wide))
                with calls_before(graph, node.next) as call:
                    part = call(aten.slice.Tensor, node, 3, 0, widths[2])
                node.replace_all_uses_with(part, delete_user_cb=lambda user, part=part: user is not part)
            count += 1
        return count
