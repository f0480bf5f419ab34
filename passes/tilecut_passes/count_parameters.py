"""Count the parameters of a graph, as a function of how many units each group keeps.

Two groups that own the same tensor (the experts of a layer and their neurons) do not take numbers from it one by one: it
holds the product of what they keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes


class ParameterCounter:
    """Floating-point numbers of a graph, or with `in_bytes` the bytes of all its tensors."""

    def __init__(self, axes: Axes, groups: Sequence[Group], in_bytes: bool = False):
        self.axes, self.in_bytes = axes, in_bytes
        self.leaf_of = {g.name: g.axis for g in groups}
        self.owned = {g.name: {m.parameter for m in g.members} for g in groups}

    def total(self, counts: Mapping[str, int] | None = None) -> int:
        """Of the whole graph when each named group keeps that many units."""
        return self._sum(self.axes.graph.tensors, counts or {})

    def of_groups(self, names: Sequence[str], counts: Mapping[str, int] | None = None) -> int:
        """Of the tensors that any of the named groups owns a part of."""
        return self._sum(dict.fromkeys(p for name in names for p in self.owned[name]), counts or {})

    def groups_together(self, sets: Sequence[Sequence[str]]) -> list[list[str]]:
        """The sets, joined where they own parts of one tensor: what they take adds up."""
        joined: list[list[str]] = []
        for names in sets:
            owned = {p for name in names for p in self.owned[name]}
            met = [one for one in joined if any(owned & self.owned[name] for name in one)]
            joined = [one for one in joined if one not in met] + [[n for one in met for n in one] + list(names)]
        return joined

    def _sum(self, tensors: Mapping[str, object], counts: Mapping[str, int]) -> int:
        leaves = {self.leaf_of[name]: n for name, n in counts.items()}
        total = 0
        for name in tensors:
            tensor = self.axes.graph.tensor(name)
            if self.in_bytes or tensor.is_floating_point():
                numbers = math.prod(_size(axis, leaves) for axis in self.axes.tensors[name])
                total += numbers * (tensor.element_size() if self.in_bytes else 1)
        return total


def _size(axis: Axis, counts: Mapping[Axis, int]) -> int:
    axis = axis.root
    if axis.is_leaf:
        return counts.get(axis, int(axis.size))
    if axis.is_concat:
        return sum(_size(p, counts) for p in axis.pieces)
    return math.prod(_size(f, counts) for f in axis.factors)
