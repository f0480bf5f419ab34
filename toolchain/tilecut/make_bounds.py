"""Bounds of packed sequences, made up to fit a graph whose inputs hold them (`cu_seqlens` of `tilecut::attention_varlen`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx

from tilecut_passes.graph import (
    PACKED_ATTENTION,
    Graph,
    Size,
    arguments,
    before_casts,
    is_call,
    number_of,
    size_of,
    sizes_of,
    value_of,
)


@dataclass(frozen=True)
class Bounds:
    """An input [size] that bounds sequences in `rows` tokens, none longer than `longest`."""

    rows: Size
    longest: Size
    size: Size

    def count(self, batch: int, at: Mapping[sympy.Symbol, int]) -> int:
        """How many sequences there must be: a batch of them, or more where those would be too long."""
        rows, longest = (number_of(s, at) for s in (self.rows, self.longest))
        return max(batch, -(-rows // max(longest, 1)))

    def make(self, length: int, at: Mapping[sympy.Symbol, int], generator: torch.Generator) -> Tensor:
        """Random bounds, `length` of them."""
        rows, longest = (number_of(s, at) for s in (self.rows, self.longest))
        found = [0]
        for left in range(length - 2, -1, -1):
            low, high = max(found[-1], rows - left * longest), min(found[-1] + longest, rows)
            found.append(rows if not left else int(torch.randint(low, high + 1, (1,), generator=generator)))
        return torch.tensor(found, dtype=torch.int32)


def find_bounds(graph: Graph) -> dict[str, Bounds]:
    """The inputs that bound packed sequences, by name."""
    names = dict(zip(graph.placeholders, graph.inputs))
    found: dict[str, Bounds] = {}
    for node in [n for n in graph.nodes if is_call(n, PACKED_ATTENTION)]:
        a = arguments(node)
        for side in "qk":
            given, longest = before_casts(a[f"cu_seqlens_{side}"]), a[f"max_{side}"]
            if given in names:
                most = size_of(value_of(longest) if isinstance(longest, fx.Node) else longest)
                (size,) = sizes_of(value_of(given))
                found.setdefault(names[given], Bounds(sizes_of(value_of(a[side]))[0], most, size))
    return found
