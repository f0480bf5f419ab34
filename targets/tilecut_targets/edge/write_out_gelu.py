"""Write the tanh form of gelu in simpler ops, for a backend that has only the exact one and takes either for it (XNNPACK).

Before: gelu(x, approximate="tanh"). After: 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))). Left alone: exact gelu.
The form: Hendrycks and Gimpel, arXiv 1606.08415.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilecut_passes.graph import Graph, arguments, calls_before, is_call

aten = torch.ops.aten


@dataclass(frozen=True)
class WriteOutGelu:
    """The tanh form of gelu becomes products, sums and a tanh."""

    def __call__(self, graph: Graph) -> int:
        """Rewrite in place; returns the number of gelus."""
        count = 0
        for node in list(graph.nodes):
            if is_call(node, aten.gelu.default) and arguments(node)["approximate"] == "tanh":
                with calls_before(graph, node) as call:
                    node.replace_all_uses_with(call(tanh_gelu, node.args[0]))
                graph.fx.erase_node(node)
                count += 1
        return count


def tanh_gelu(x: Tensor) -> Tensor:
    """The tanh form of gelu."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
