"""Fuse a linear layer's bias into the gelu after it: com.microsoft::BiasGelu.

Before: gelu(linear(x, W, b)). After: BiasGelu(linear(x, W), b). Left alone: tanh approximations, layers without bias or
with another user.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.graph import Graph, arguments, calls_before, is_call
from tilecut_targets.edge import ort_ops

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerBiasGelu:
    """gelu after a biased linear layer becomes BiasGelu."""

    def __call__(self, graph: Graph) -> int:
        """Rewrite in place; returns the number of gelus."""
        count = 0
        for node in list(graph.nodes):
            linear = node.args[0] if self.match(node) else None
            if not isinstance(linear, fx.Node):
                continue
            a = arguments(linear)
            with calls_before(graph, node) as call:
                bare = call(aten.linear.default, a["input"], a["weight"])
                fused = call(ort_ops.bias_gelu, bare, a["bias"])
            node.replace_all_uses_with(fused)
            graph.fx.erase_node(node)
            count += 1
        return count

    def match(self, node: fx.Node) -> bool:
        """Whether a node is an exact gelu of a biased linear layer that nothing else reads."""
        if not is_call(node, aten.gelu.default) or arguments(node)["approximate"] != "none":
            return False
        linear = node.args[0]
        return is_call(linear, aten.linear.default) and arguments(linear)["bias"] is not None and len(linear.users) == 1
