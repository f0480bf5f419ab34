"""Attention in float64, from its definition, one sequence and one head at a time; and Triton's random numbers."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Meaning:
    """What an attention computes, beside its tensors."""

    scale: float
    causal: str = "none"
    window: tuple[int, int] = (-1, -1)
    global_tokens: int = 0
    softcap: float = 0.0
    dropout_p: float = 0.0
    dropout_seed: int = 0


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meaning: Meaning,
    *,
    keep: Tensor,
    bias: Tensor,
    slope: float,
    head: int,
    max_k: int,
) -> tuple[Tensor, Tensor]:
    """(out [Sq, E], lse [Sq]) of one head: q [Sq, D], k [Sk, D], v [Sk, E] in float64.

    keep: bool [Sq, Sk], what padding and blocks leave visible; bias: [Sq, Sk]; head: its number over all sequences.
    """
    sq, sk = len(q), len(k)
    shift = 0 if meaning.causal == "top_left" else sk - sq
    i = torch.arange(sq)[:, None] + shift
    j = torch.arange(sk)[None, :]
    left, right = meaning.window
    near = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        near &= j >= i - left
    if right >= 0:
        near &= j <= i + right
    if meaning.global_tokens:
        near |= (j < meaning.global_tokens) | (i < meaning.global_tokens)
    keep = keep & near
    if meaning.causal != "none":
        keep = keep & (j <= i)
    scores = q @ k.T * meaning.scale
    if meaning.softcap:
        scores = meaning.softcap * torch.tanh(scores / meaning.softcap)
    scores = scores + bias - slope * (i - j).abs()
    scores = torch.where(keep, scores, -torch.inf)
    seen = keep.any(1)
    weights = torch.zeros_like(scores)
    weights[seen] = torch.softmax(scores[seen], 1)
    if meaning.dropout_p:
        number = (torch.arange(sq)[:, None] * max_k + torch.arange(sk)[None, :]).numpy().astype(np.int32)
        kept = torch.from_numpy(uniform(meaning.dropout_seed + head, number) > np.float32(meaning.dropout_p))
        weights = weights * kept / (1 - meaning.dropout_p)
    # What nobody sees may hold anything.
    v = torch.where(keep.any(0)[:, None], v, 0.0)
    return weights @ v, torch.logsumexp(scores, 1)


def uniform(seed: int, offsets: np.ndarray) -> np.ndarray:
    """`tl.rand(seed, offsets)`: float32 in [0, 1) from Philox-4x32-10 (Salmon et al., SC 2011)."""
    word = np.uint64(0xFFFFFFFF)
    c = [offsets.astype(np.uint32).astype(np.uint64)] + [np.zeros(offsets.shape, np.uint64)] * 3
    keys = [np.uint64(seed) & word, np.uint64(seed) >> np.uint64(32)]
    for _ in range(10):
        low, high = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (high >> np.uint64(32)) ^ c[1] ^ keys[0],
            high & word,
            (low >> np.uint64(32)) ^ c[3] ^ keys[1],
            low & word,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & word, (keys[1] + np.uint64(0xBB67AE85)) & word]
    signed = c[0].astype(np.uint32).view(np.int32)
    # As `uint_to_uniform_float` of triton has it.
    return np.where(signed < 0, ~signed, signed).astype(np.float32) * np.float32(4.6566127342e-10)
