"""Round weights to few bits: the integers and scales that are closest to them.

    columns     w [K, N] -> int8 [K, N] and one scale a column
    blocks      w [K, N] -> 4-bit integers with one scale and one zero point a block of rows, packed for MatMulNBits

A scale that covers the largest weight wastes steps on it; a smaller one clips it. Of a grid of scales each column or
block takes the one with the least squared error, clipping included.

Columns keep |w[2i] + w[2i+1]| <= 128. x86 without VNNI multiplies a pair of weights with a pair of unsigned activations
into one 16-bit sum that saturates: 255 * 128 fits, 255 * 129 does not. The usual remedy, weights of 7 bits, gives up half of
the steps of every weight; this costs only columns that have such a pair. `docs/quantization.md` has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The grid: the scale as a fraction of the one that covers the largest weight. Above 1 a column has room for its pairs.
FRACTIONS = (2.0, 1.6, 1.4, 1.3, 1.2, 1.1, 1.05, 1.0, 0.95, 0.9, 0.8, 0.7)
BLOCK_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
MOST, PAIR = 127, 128
# Numbers handled at once.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Columns:
    """w [K, N] as values int8 [K, N] times scale float32 [N]."""

    values: np.ndarray
    scale: np.ndarray

    def restored(self) -> np.ndarray:
        """What the integers stand for."""
        return self.values.astype(np.float32) * self.scale


@dataclass(frozen=True)
class Blocks:
    """w [K, N] in 4 bits, as MatMulNBits reads it.

    packed uint8 [N, K/block, block/2] with the even row in the low half, scale float32 [N, K/block], zero uint8
    [N, K/block/2] packed likewise. The last block of a column may be filled up with its zero point.
    """

    packed: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    rows: int

    def restored(self) -> np.ndarray:
        """What the integers stand for."""
        columns, blocks, half = self.packed.shape
        values = _unpack(self.packed).astype(np.float32)
        zero = _unpack(self.zero)[:, :blocks, None].astype(np.float32)
        return ((values - zero) * self.scale[:, :, None]).reshape(columns, blocks * half * 2)[:, : self.rows].T


def round_columns(w: np.ndarray) -> Columns:
    """int8 with a scale a column, safe in 16-bit sums of pairs of rows."""
    values, scale = np.empty(w.shape, np.int8), np.empty(w.shape[1], np.float32)
    step = max(1, CHUNK // max(1, w.shape[0]))
    for at in range(0, w.shape[1], step):
        values[:, at : at + step], scale[at : at + step] = _round_columns(w[:, at : at + step].astype(np.float32))
    return Columns(values, scale)


def _round_columns(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    covering = _above_zero(np.abs(w).max(0) / MOST)
    best = np.full(w.shape[1], np.inf, np.float32)
    values, scale = np.zeros(w.shape, np.int8), covering.copy()
    for fraction in FRACTIONS:
        tried = (covering * np.float32(fraction)).astype(np.float32)
        rounded = keep_pairs(np.clip(np.rint(w / tried), -MOST, MOST))
        error = np.square(rounded * tried - w).sum(0)
        better = error < best
        best = np.where(better, error, best)
        values[:, better], scale[better] = rounded[:, better].astype(np.int8), tried[better]
    return values, scale


def keep_pairs(values: np.ndarray) -> np.ndarray:
    """Integers [K, N] with what two neighbouring rows have above 128 together taken from both, half each."""
    even = values[: len(values) // 2 * 2].reshape(-1, 2, values.shape[1])
    sums = even.sum(1)
    excess = np.sign(sums) * np.maximum(np.abs(sums) - PAIR, 0)
    first = np.trunc(excess / 2)
    even -= np.stack([first, excess - first], 1)
    return values


def round_blocks(w: np.ndarray, block: int) -> Blocks:
    """4 bits with a scale and a zero point for every `block` rows of a column."""
    rows, columns = w.shape
    count = -(-rows // block)
    packed = np.empty((columns, count, block // 2), np.uint8)
    scale, zero = np.empty((columns, count), np.float32), np.zeros((columns, count + count % 2), np.uint8)
    step = max(1, CHUNK // max(1, rows))
    for at in range(0, columns, step):
        part = np.zeros((min(step, columns - at), count * block), np.float32)
        part[:, :rows] = w[:, at : at + step].T
        values, scale[at : at + step], zero[at : at + step, :count] = _round_blocks(
            part.reshape(len(part), count, block), (np.arange(count * block) < rows).reshape(count, block)
        )
        values.reshape(len(part), -1)[:, rows:] = np.repeat(
            zero[at : at + step, count - 1 : count], count * block - rows, 1
        )
        packed[at : at + step] = _pack(values)
    return Blocks(packed, scale, _pack(zero), rows)


def _round_blocks(w: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w [N, blocks, block]; only what is `counted` [blocks, block] counts as an error."""
    low, high = np.minimum(w.min(2), 0), np.maximum(w.max(2), 0)
    best = np.full(low.shape, np.inf, np.float32)
    values = np.zeros(w.shape, np.uint8)
    scale, zero = np.ones(low.shape, np.float32), np.zeros(low.shape, np.uint8)
    for fraction in BLOCK_FRACTIONS:
        tried = _above_zero((high - low) * np.float32(fraction) / 15)
        at = np.clip(np.rint(-low * np.float32(fraction) / tried), 0, 15)
        rounded = np.clip(np.rint(w / tried[:, :, None]) + at[:, :, None], 0, 15)
        error = (np.square((rounded - at[:, :, None]) * tried[:, :, None] - w) * counted).sum(2)
        better = error < best
        best = np.where(better, error, best)
        values[better] = rounded[better].astype(np.uint8)
        scale[better], zero[better] = tried[better], at[better].astype(np.uint8)
    return values, scale, zero


def _above_zero(scale: np.ndarray) -> np.ndarray:
    """Scales as float32; a column of zeros gets 1."""
    return np.where(scale > np.finfo(np.float32).tiny, scale, 1).astype(np.float32)


def _pack(values: np.ndarray) -> np.ndarray:
    return values[..., ::2] | (values[..., 1::2] << 4)


def _unpack(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
