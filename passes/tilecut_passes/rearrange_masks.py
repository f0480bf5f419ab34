"""Mask rearrangement: exchange kept and removed units of a group so that removing them costs less, interactions counted.

Before: the units that a search by the diagonal kept, and the full Fisher information F of the group's gates. After: as
many units, with a lower 1_R^T F 1_R over the removed units R, and no exchange of one unit for another that lowers it.
Groups do not interact (F is block-diagonal over the layers). Left alone: a group without a matrix, or kept whole.

Kwon et al., A Fast Post-Training Pruning Framework for Transformers, arXiv 2204.09656, section 4.2: a greedy search
started from the searched mask. There a round visits units in turn; here each swap is the best of all pairs, so the
result depends on no order, and the descent ends at a set that no single swap improves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def rearrange_masks(kept: Mapping[str, Sequence[int]], fisher: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The units to keep of every group, by its Fisher matrix [U, U]; a group without one keeps what it has."""
    return {name: rearrange(units, fisher[name]) if name in fisher else tuple(units) for name, units in kept.items()}


def rearrange(kept: Sequence[int], fisher: Tensor, swaps: int | None = None) -> tuple[int, ...]:
    """As many units as `kept`, ascending, that lose no more.

    Args:
        fisher: [U, U], symmetric.
        swaps: at most so many exchanges; None: U.
    """
    matrix = fisher.double().cpu().numpy()
    stays = np.zeros(len(matrix), dtype=bool)
    stays[list(kept)] = True
    inside, outside = stays.nonzero()[0], (~stays).nonzero()[0]
    if not len(inside) or not len(outside):
        return tuple(inside.tolist())
    own = matrix.diagonal()
    # Per unit, the sum of its interactions with all removed ones.
    together = matrix[:, outside].sum(1)
    between = -2 * matrix[outside][:, inside]
    change = np.empty_like(between)
    # Less than this is rounding, and could go on for ever.
    least = 1e-12 * np.abs(own).sum()
    for _ in range(len(matrix) if swaps is None else swaps):
        # By how much the loss rises when the outside unit comes back and the inside one goes instead.
        np.add(between, (own - 2 * together)[outside][:, None], out=change)
        change += (own + 2 * together)[inside]
        i, j = divmod(int(change.argmin()), len(inside))
        if change[i, j] >= -least:
            break
        comes, goes = outside[i], inside[j]
        outside[i], inside[j] = goes, comes
        between[i], between[:, j] = -2 * matrix[goes, inside], -2 * matrix[outside, comes]
        together += matrix[goes] - matrix[comes]
    return tuple(sorted(inside.tolist()))


def removal_loss(kept: Sequence[int], fisher: Tensor) -> float:
    """1_R^T F 1_R over the units that are not kept: twice the loss that their removal is predicted to cost."""
    gone = torch.ones(len(fisher), dtype=torch.float64)
    gone[list(kept)] = 0
    return float(gone @ fisher.double() @ gone)
