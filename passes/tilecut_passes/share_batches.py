"""Data-parallel calibration: every process takes a share of the batches, and sums are over all of them.

Where torch.distributed is initialised (`accelerate launch` does that), process r of n takes batches r, r + n, ..; else
one process takes all. What is computed from the sums is then the same on every process, up to the order of addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from tilecut_passes.calibration import Batch


def process() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def own_share(batches: Sequence[Batch]) -> list[tuple[int, Batch]]:
    """The batches of this process, each with its index among all of them."""
    rank, count = process()
    return list(enumerate(batches))[rank::count]


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if process()[1] > 1:
        torch.distributed.all_reduce(value)
    return value


def batch_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of one batch: the same whichever process takes it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def agreed(value: Any) -> Any:
    """What the first process holds, on all of them."""
    if process()[1] == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held)
    return held[0]
