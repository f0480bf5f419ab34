"""Inputs that say how many keys of each row are real: integers [B] that a graph compares with places along another size."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, Size, is_call, sizes_of, value_of

aten = torch.ops.aten
COMPARISONS = (aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor)


def find_lengths(graph: Graph) -> dict[str, Size]:
    """The inputs that are lengths, by name, each with how many places there are."""
    found = {}
    for name, node in zip(graph.inputs, graph.placeholders, strict=True):
        value = value_of(node)
        if value.ndim == 1 and not value.is_floating_point() and value.dtype != torch.bool:
            places = _compared_with(node, sizes_of(value)[0])
            if places is not None:
                found[name] = places
    return found


def _compared_with(given: fx.Node, rows: Size) -> Size | None:
    """The last size of the first comparison [rows, .., places] of what is made of an input, or None."""
    waiting, seen = [given], {given}
    while waiting:
        for user in waiting.pop(0).users:
            value = value_of(user)
            # Rows of a table are chosen by it: an id.
            if user in seen or not isinstance(value, Tensor) or is_call(user, aten.embedding.default):
                continue
            sizes = sizes_of(value)
            if is_call(user, *COMPARISONS):
                if len(sizes) > 1 and sizes[0] == rows and sizes[-1] not in (1, rows):
                    return sizes[-1]
            elif value.dtype != torch.bool:
                seen.add(user)
                waiting.append(user)
    return None
