"""Spell the residual addition before a layer norm or an RMS norm as Sum.

Before: layer_norm(add(x, y)). After: layer_norm(Sum(x, y)). onnxruntime's default optimizer turns Add + LayerNorm into
SkipLayerNormalization, which is several times slower than the two on CPU; it leaves Sum alone, so that the file is fast
under a plain InferenceSession. Before RMS norms onnxruntime 1.32 fuses neither; others have a fusion for Add there too.
Left alone: additions with broadcasting, alpha, or constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.graph import Graph, is_call, sizes_of, source, value_of
from tilecut_targets.edge import ort_ops

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class LowerResidual:
    """add before a norm becomes Sum."""

    def __call__(self, graph: Graph) -> int:
        """Rewrite in place; returns the number of additions."""
        count = 0
        for node in list(graph.nodes):
            if is_call(node, *NORMS) and self.match(node.args[0]):
                source(node).target = ort_ops.residual_sum
                count += 1
        return count

    def match(self, node: object) -> bool:
        """Whether a node adds two activations or inputs of one shape."""
        if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
            return False
        x, y = node.args
        return (
            isinstance(x, fx.Node)
            and isinstance(y, fx.Node)
            and "get_attr" not in (x.op, y.op)
            and sizes_of(value_of(x)) == sizes_of(value_of(y)) == sizes_of(value_of(node))
        )
