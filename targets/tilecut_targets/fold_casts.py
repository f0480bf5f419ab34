"""Weights in the type that they are read in: a cast of a parameter becomes a parameter.

Before: aten.to.dtype(get_attr w, float16). After: get_attr w_float16. Left alone: casts of anything else. For files whose
runtime does not fold constants itself; a weight that is read in two types is then there twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from tilecut_passes.graph import Graph, is_call, source


@dataclass(frozen=True)
class FoldCasts:
    """Every cast of a parameter or buffer is made now."""

    def match(self, node: fx.Node) -> str | None:
        """The tensor that is cast, or None."""
        if not is_call(node, torch.ops.aten.to.dtype) or source(node).op != "get_attr":
            return None
        return str(source(node).target)

    def __call__(self, graph: Graph) -> int:
        """Fold in place; returns the number of casts."""
        made: dict[tuple[str, torch.dtype], fx.Node] = {}
        count = 0
        for node in list(graph.nodes):
            if (name := self.match(node)) is None:
                continue
            dtype = node.args[1]
            assert isinstance(dtype, torch.dtype)
            if (name, dtype) not in made:
                tensor = graph.tensor(name)
                cast = tensor.detach().to(dtype)
                value = nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast
                made[name, dtype] = graph.add_tensor(f"{name}_{str(dtype).removeprefix('torch.')}", value)
            node.replace_all_uses_with(made[name, dtype])
            graph.fx.erase_node(node)
            count += 1
        return count
