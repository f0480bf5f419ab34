"""Products with a matrix for each expert, for closed-form refits.

    sorted    tilecut::grouped_matmul(x [T, I], weight [E, I, O], ends [E]): the rows of an expert lie together
    dense     bmm or matmul of x [.., E, T, I] and weight [E, I, O]: every expert sees every row

The matrices may be read through a transpose of their last two dimensions. Experts in a loop over masks are dense layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilecut_passes.graph import is_call, source, value_of
from tilecut_passes.step_graph import Stepper
from tilecut_passes.weight_view import read_weight

# Importing it registers the op.
from tilecut_runtime import grouped_matmul as _grouped_matmul_op

aten = torch.ops.aten
assert _grouped_matmul_op
SORTED = torch.ops.tilecut.grouped_matmul.default
DENSE = (aten.bmm.default, aten.matmul.default)


@dataclass(frozen=True)
class ExpertLayer:
    """y_e = x_e W_e^T. The tensor `weight` holds [E, I, O], or [E, O, I] where `transposed`; there is no bias."""

    weight: str
    transposed: bool
    bias: None = None

    def matrices(self, held: Tensor) -> Tensor:
        """What the tensor `weight` holds as [E, O, I], a view."""
        return held if self.transposed else held.transpose(1, 2)

    def rows(self, node: fx.Node, run: Stepper, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per expert: the rows [N, I] that the call sees in `run`, and their targets [N, O]."""
        x = run.read(source(node))
        valid = run.valid(source(node))
        if node.target is not SORTED:
            for e in range(x.shape[-3]):
                yield e, x[..., e, :, :].flatten(0, -2), target[..., e, :, :].flatten(0, -2)
            return
        ends = run.read(source(node, 2)).tolist()
        for e, (low, high) in enumerate(itertools.pairwise([0, *ends])):
            here = slice(low, high) if valid is None else valid[low:high].nonzero().flatten() + low
            yield e, x[here], target[here]


def expert_layer(node: fx.Node) -> ExpertLayer | None:
    """The layer that a call is, or None."""
    if not is_call(node, SORTED, *DENSE):
        return None
    read = read_weight(node.args[1])
    x = value_of(source(node))
    if read is None or value_of(read[0]).ndim != 3:
        return None
    if node.target is not SORTED and (x.ndim < 3 or x.shape[-3] != value_of(read[0]).shape[0]):
        return None
    return ExpertLayer(str(read[0].target), read[1])
