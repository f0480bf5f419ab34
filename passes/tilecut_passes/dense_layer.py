"""The calls that multiply an activation by a weight matrix, in one view: linear, addmm and mm (GPT-2's Conv1D), matmul.

The matrix may be read through a transpose, as `x @ weight.T` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, arguments, is_call, source, value_of
from tilecut_passes.step_graph import Stepper
from tilecut_passes.weight_view import read_weight

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
        return self.matrices(graph.tensor(self.weight).detach())[0]

    def offset(self, graph: Graph) -> Tensor:
        """b as [O]; zeros where there is none."""
        matrix = self.matrix(graph)
        return graph.tensor(self.bias).detach() if self.bias is not None else matrix.new_zeros(len(matrix))

    def matrices(self, held: Tensor) -> Tensor:
        """What the tensor `weight` holds as [1, O, I], a view."""
        return (held.T if self.transposed else held)[None]

    def rows(self, node: fx.Node, run: Stepper, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The rows [N, I] that the call sees in `run` and is to map, and their targets [N, O]."""
        x = source(node, self.x)
        seen, real = run.read(x), run.valid(x)
        if real is not None:
            seen, target = seen[real], target[real]
        yield 0, seen.reshape(-1, seen.shape[-1]), target.reshape(-1, target.shape[-1])


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
    read = read_weight(weight)
    if read is None or value_of(read[0]).ndim != 2:
        return None
    if isinstance(bias, fx.Node) and (bias.op != "get_attr" or value_of(bias).ndim != 1):
        # What is added is computed: nothing can be refitted into it, and it cannot be left out.
        return None
    return DenseLayer(
        str(read[0].target), str(bias.target) if isinstance(bias, fx.Node) else None, x, transposed != read[1]
    )
