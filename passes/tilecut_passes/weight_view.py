"""Weights that a call reads through transposes of their last two dimensions, as `x @ weight.T` does."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tilecut_passes.graph import is_call, source, value_of

aten = torch.ops.aten


def read_weight(node: object) -> tuple[fx.Node, bool] | None:
    """The tensor that a node reads as it is (False) or with its last two dimensions exchanged (True); None for others."""
    exchanged = False
    while isinstance(node, fx.Node) and is_matrix_transpose(node):
        node, exchanged = source(node), not exchanged
    return (node, exchanged) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def is_matrix_transpose(node: fx.Node) -> bool:
    """Whether a call exchanges the last two dimensions and nothing else."""
    rank = value_of(node).ndim if isinstance(value_of(node), Tensor) else 0
    if rank < 2:
        return False
    if is_call(node, aten.t.default, aten.numpy_T.default, aten.mT.default):
        return rank == 2 or node.target is aten.mT.default
    if is_call(node, aten.transpose.int):
        return {int(d) % rank for d in node.args[1:]} == {rank - 2, rank - 1}  # type: ignore[arg-type]
    if is_call(node, aten.permute.default):
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return False
