"""Philox-4x32-10 in torch integer arithmetic: the random numbers of Triton's `tl.rand`, bit for bit. torch only.

A counter-based generator: the number at (seed, offset) needs no state, so a kernel and its backward draw the same
dropout mask without keeping it, and a CPU draws the one of a GPU. Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011); constants and the conversion to float32 as in triton/language/random.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
LOW = 0xFFFFFFFF
# The largest float32 for which (2 ** 31 - 1) * SCALE stays below 1.
SCALE = 4.6566127342e-10


def rand(seed: Tensor, offset: Tensor) -> Tensor:
    """float32 in [0, 1), `tl.rand(seed, offset)`.

    Args:
        seed: int64, broadcasts with `offset`.
        offset: integers, of which the lower 32 bits count, as in an int32 that wraps.

    Returns:
        float32 of the broadcast shape.
    """
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    c0, k0 = torch.broadcast_tensors(offset.to(torch.int64) & LOW, k0)
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        # A product of two 32-bit numbers wraps in int64, and its bits are the right ones.
        a, b = c0 * ROUND_A, c2 * ROUND_B
        c0, c1, c2, c3 = ((b >> 32) & LOW) ^ c1 ^ k0, b & LOW, ((a >> 32) & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + KEY_A) & LOW, (k1 + KEY_B) & LOW
    # As int32, with its negative numbers complemented.
    positive = torch.where(c0 < 2**31, c0, LOW - c0)
    return positive.to(torch.float32) * torch.tensor(SCALE, dtype=torch.float32, device=c0.device)


def dropout_mask(seed: Tensor, streams: Tensor, max_k: int, sq: int, sk: int, dropout_p: float) -> Tensor:
    """Which pairs of query and key dropout keeps.

    Args:
        seed: int64 [1].
        streams: int64 [B, Hq], the number of each (batch row or sequence, head): b * Hq + h.
        max_k: keys that a row of the mask is counted by; Sk of a dense attention.
        sq: queries.
        sk: keys.
        dropout_p: probability of being dropped.

    Returns:
        bool [B, Hq, sq, sk], True where rand(seed + stream, i * max_k + j) > dropout_p.
    """
    places = torch.arange(sq, device=seed.device)[:, None] * max_k + torch.arange(sk, device=seed.device)
    drawn = rand((seed + streams)[..., None, None], places)
    return drawn > torch.tensor(dropout_p, dtype=torch.float32, device=seed.device)
