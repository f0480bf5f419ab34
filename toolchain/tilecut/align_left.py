"""Rows that are padded on the left, moved to the left edge for a graph that counts positions from there.

    ids [pad pad a b c], positions [. . 0 1 2]   ->   ids [a b c pad pad], positions 0 1 2 3 4

`generate` pads on the left and says so through `position_ids`. A graph that was captured without that input counts from
the left edge, so its rows are moved there, and its outputs back.
"""

from __future__ import annotations

import torch
from torch import Tensor


def left_padding(mask: Tensor, positions: Tensor) -> Tensor | None:
    """How many positions every row is padded with on its left, [B]; None where positions count otherwise.

    Args:
        mask: [B, S], 0 at padding.
        positions: [B, S]; what they say at padding does not count.
    """
    real = mask != 0
    counted = real.long().cumsum(-1) - 1
    # Real positions must be in one piece: a hole would stay where it is.
    first = real.long().argmax(-1)
    whole = torch.arange(mask.shape[-1], device=mask.device) - first[:, None]
    fits = (positions.expand_as(mask) == counted) & (whole == counted)
    return first if bool((fits | ~real).all()) else None


def roll(value: Tensor, by: Tensor) -> Tensor:
    """Row i of [B, S, ..] moved by `by[i]` to the left, around the edge."""
    places = (torch.arange(value.shape[1], device=value.device) + by.to(value.device)[:, None]) % value.shape[1]
    return value.gather(1, places.view(*places.shape, *[1] * (value.ndim - 2)).expand_as(value))
