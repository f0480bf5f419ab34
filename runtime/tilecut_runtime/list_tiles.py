"""The tiles of packed sequences as one list, heaviest first, so that the last programs to start are short ones.

Made on the sequences' device without waiting for it: the list is as long as the lengths could make it, and the entries
that they do not need carry the sequence -1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def list_tiles(lengths: Tensor, rows: int, longest: int, block: int, spans: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Every tile of `block` rows of every sequence.

    Args:
        lengths: int [N], the sequences' rows; rows: their sum; longest: an upper bound of each.
        spans: (others, back, ahead), each int [N]: row r works on the positions [r - back, r + ahead] that lie within
            [0, others); this is what tiles are weighed by.

    Returns:
        int32 [n, 2] of (sequence, tile), -1 for the sequence of an entry without work; n depends on rows, N and
        longest alone.
    """
    n = min(rows // block + len(lengths), len(lengths) * (-(-longest // block)))
    counts = (lengths + (block - 1)) // block
    ends = counts.cumsum(0)
    place = torch.arange(n, device=lengths.device)
    sequence = torch.searchsorted(ends, place, right=True).clamp_max_(len(lengths) - 1)
    tile = place - (ends - counts)[sequence]
    others, back, ahead = (span[sequence] for span in spans)
    first = (tile * block - back).clamp_min_(0)
    last = torch.minimum(others, torch.minimum((tile + 1) * block, lengths[sequence]) + ahead)
    unused = place >= ends[-1]
    weight = (last - first).clamp_min_(0).masked_fill_(unused, -1)
    order = torch.argsort(weight, descending=True, stable=True)
    listed = torch.stack((sequence.masked_fill_(unused, -1), tile), 1)
    return listed[order].to(torch.int32)
