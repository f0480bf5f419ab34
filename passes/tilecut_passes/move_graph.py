"""A graph on another device, with tensors of its own.

Before: a graph, on the device that its model was captured on. After: the original is as it was; the copy's tensors are
copies on `device`, and what its calls make (positions, masks) is made there too. The fake values that nodes carry still
name the old device: the copy is for running.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from tilecut_passes.graph import Graph


def move_graph(graph: Graph, device: torch.device) -> Graph:
    """A copy of `graph` that runs on `device` and shares no tensor with it."""
    moved = graph.copy()
    for name, tensor in graph.tensors.items():
        held = tensor.detach().to(device, copy=True)
        moved.set_tensor(name, nn.Parameter(held, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else held)

    def there(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in moved.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, there)  # pyright: ignore[reportAttributeAccessIssue]
            node.kwargs = fx.node.map_aggregate(node.kwargs, there)  # pyright: ignore[reportAttributeAccessIssue]
    moved.module.recompile()
    return moved
