"""A CSR of visible blocks the other way round: for each block of keys, the blocks of queries that see it.

Blocks are 64 x 64 and counted within each sequence; the rows of the CSR are the blocks of all sequences one after
another. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Queries and keys of a block of the block list.
BLOCK = 64


def first_blocks(lengths: Tensor) -> Tensor:
    """int32 [N]: the row at which each sequence's blocks begin."""
    counts = (lengths + (BLOCK - 1)) // BLOCK
    return (counts.cumsum(0) - counts).to(torch.int32)


def transpose_blocks(
    offsets: Tensor, indices: Tensor, first_query_blocks: Tensor, first_key_blocks: Tensor, key_blocks: int
) -> tuple[Tensor, Tensor]:
    """(offsets int32 [H, key_blocks + 1], indices int32 [nnz]) of the transpose.

    Args:
        offsets: int32 [H, query blocks + 1] into indices; indices: int32 [nnz], blocks of keys within their sequence.
        first_query_blocks, first_key_blocks: `first_blocks` of both sides; key_blocks: an upper bound of all blocks of
            keys, those that do not exist being empty.
    """
    heads, rows = offsets.shape[0], max(offsets.shape[1] - 1, 1)
    entry = torch.arange(len(indices), device=indices.device)
    # The last row that starts at or before an entry owns it: those that start there too and end there are empty.
    row = torch.searchsorted(offsets[:, :-1].reshape(-1).long(), entry, right=True) - 1
    head, query_block = row // rows, row % rows
    sequence = torch.searchsorted(first_query_blocks.long(), query_block, right=True) - 1
    key = head * key_blocks + first_key_blocks[sequence] + indices
    # Space after the last row belongs to none.
    key = key.masked_fill(entry >= offsets[-1, -1], heads * key_blocks)
    key, order = torch.sort(key, stable=True)
    local = (query_block - first_query_blocks[sequence])[order].to(torch.int32)
    starts = torch.searchsorted(key, torch.arange(heads * key_blocks + 1, device=key.device)).to(torch.int32)
    index = torch.arange(key_blocks + 1, device=key.device)[None, :]
    return starts[torch.arange(heads, device=key.device)[:, None] * key_blocks + index], local
