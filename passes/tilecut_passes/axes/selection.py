"""Which units of each leaf stay, and in which order: what cutting, padding and masking have in common.

A selection maps a leaf to the indices of the units that stay; -1 stands for a new unit of zeros (padding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tilecut_passes.axes.axis import Axis

PAD = -1


class Selection:
    """Units kept per leaf, and what that means for any axis made of them.

    `stand_ins` are units that are read instead of one that went, where a leaf has such a unit (a vocabulary).
    """

    def __init__(self, units: Mapping[Axis, Sequence[int]], stand_ins: Mapping[Axis, int] | None = None):
        self.units = {leaf: torch.tensor(list(kept), dtype=torch.long) for leaf, kept in units.items()}
        self.stand_ins = dict(stand_ins or {})

    def touches(self, axis: Axis) -> bool:
        """Whether any leaf of the axis changes."""
        return any(leaf in self.units for leaf in axis.leaves)

    def loses(self, axis: Axis) -> bool:
        """Whether any unit of a static axis goes; one that is only reordered or padded loses none."""
        return self.touches(axis) and not bool(self.kept_mask(axis).all())

    def count(self, axis: Axis) -> int:
        """How many indices a static axis has afterwards."""
        axis = axis.root
        if axis.is_leaf:
            return len(self.units[axis]) if axis in self.units else int(axis.size)
        if axis.is_concat:
            return sum(self.count(p) for p in axis.pieces)
        return math.prod(self.count(f) for f in axis.factors)

    def indices(self, axis: Axis) -> Tensor:
        """The old index of every new one along a static axis; PAD where it is new."""
        axis = axis.root
        if axis.is_leaf:
            return self.units[axis] if axis in self.units else torch.arange(int(axis.size))
        if axis.is_concat:
            parts = [
                torch.where(self.indices(p) == PAD, PAD, self.indices(p) + start)
                for p, start in zip(axis.pieces, axis.edges)
            ]
            return torch.cat(parts) if parts else torch.arange(0)
        index = torch.zeros(1, dtype=torch.long)
        for factor in axis.factors:
            inner = self.indices(factor)
            is_pad = (index[:, None] == PAD) | (inner[None] == PAD)
            index = torch.where(is_pad, PAD, index[:, None] * int(factor.size) + inner[None]).flatten()
        return index

    def places(self, axis: Axis) -> Tensor:
        """The new index of every old one along a static axis; -1 where it went."""
        index = self.indices(axis)
        places = torch.full((int(axis.root.size),), -1)
        places[index[index != PAD]] = (index != PAD).nonzero().flatten()
        return places

    def kept_mask(self, axis: Axis) -> Tensor:
        """Bool over the old indices of a static axis: True where it stays."""
        mask = torch.zeros(int(axis.root.size), dtype=torch.bool)
        index = self.indices(axis)
        mask[index[index != PAD]] = True
        return mask


def take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """`tensor` with the indices of `index` along `dim`; zeros where it says PAD."""
    index = index.to(tensor.device)
    taken = tensor.index_select(dim, index.clamp_min(0))
    if (index == PAD).any():
        shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
        taken = taken.masked_fill((index == PAD).reshape(shape), 0)
    return taken
