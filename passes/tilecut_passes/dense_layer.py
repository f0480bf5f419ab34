"""The calls that multiply an activation by a weight matrix, in one view: linear, addmm and mm (GPT-2's Conv1D), matmul."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, arguments, is_call, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class DenseLayer:
    """y = x W^T + b. The tensor `weight` holds W [O, I], or [I, O] where `transposed`; x is argument `x` of the call.

    `bias` is None where there is none, or where it is no tensor of its own.
    """

    weight: str
    bias: str | None
    x: int
    transposed: bool

    def matrix(self, graph: Graph) -> Tensor:
        """W as [O, I]."""
        held = graph.tensor(self.weight).detach()
        return held.T if self.transposed else held

    def offset(self, graph: Graph) -> Tensor:
        """b as [O]; zeros where there is none."""
        matrix = self.matrix(graph)
        return graph.tensor(self.bias).detach() if self.bias is not None else matrix.new_zeros(len(matrix))

    def held(self, matrix: Tensor) -> Tensor:
        """A W [O, I] as the tensor holds it."""
        return (matrix.T if self.transposed else matrix).contiguous()


def dense_layer(node: fx.Node) -> DenseLayer | None:
    """The layer that a call is, or None."""
    if is_call(node, aten.linear.default):
        x, weight, bias, transposed = 0, node.args[1], node.args[2] if len(node.args) > 2 else None, False
    elif is_call(node, aten.addmm.default) and (arguments(node)["beta"], arguments(node)["alpha"]) == (1, 1):
        x, weight, bias, transposed = 1, node.args[2], node.args[0], True
    elif is_call(node, aten.mm.default, aten.matmul.default):
        x, weight, bias, transposed = 0, node.args[1], None, True
    else:
        return None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or value_of(weight).ndim != 2:
        return None
    if isinstance(bias, fx.Node) and (bias.op != "get_attr" or value_of(bias).ndim != 1):
        # What is added is computed: nothing can be refitted into it, and it cannot be left out.
        return None
    return DenseLayer(str(weight.target), str(bias.target) if isinstance(bias, fx.Node) else None, x, transposed)
