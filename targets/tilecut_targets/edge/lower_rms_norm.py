"""Write RMS norms in the ops of which onnxruntime makes one kernel when it loads the file.

Before: aten.rms_norm(x, [H], weight, eps). After: x / sqrt(mean(x ** 2) + eps) * weight, a division: of that onnxruntime's
default optimizer makes SimplifiedLayerNormalization. Of the product with a reciprocal, which torch's exporter writes, it
makes nothing. Left alone: norms without weight, of which it makes nothing either, over several dimensions, and of another
type than float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilecut_passes.graph import Graph, arguments, calls_before, is_call, value_of
from tilecut_targets.decompose_norms import default_eps

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerRmsNorm:
    """Every weighted RMS norm is written as a division."""

    def __call__(self, graph: Graph) -> int:
        """Rewrite in place; returns the number of norms."""
        count = 0
        for node in [n for n in graph.nodes if self.match(n)]:
            a = arguments(node)
            with calls_before(graph, node) as call:
                made = call(rms_norm, a["input"], a["weight"], default_eps(torch.float32) if a["eps"] is None else a["eps"])
            node.replace_all_uses_with(made)
            graph.fx.erase_node(node)
            count += 1
        return count

    def match(self, node: object) -> bool:
        """Whether a node is a norm that onnxruntime has the kernel for."""
        if not is_call(node, aten.rms_norm.default):
            return False
        a = arguments(node)
        return len(a["normalized_shape"]) == 1 and a["weight"] is not None and value_of(node).dtype == torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., H], weight [H], in the spelling that onnxruntime knows."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
