"""What a run costs on a GPU, calculated: waves of tiles, or bytes, whichever takes longer.

A product of [M, K] and [K, N] is cut into tiles of m x n, which the GPU's P processors make P at a time:

    time = max(ceil(M / m) * ceil(N / n) / P, rounded up, * time of a tile;  bytes / bandwidth)

with the tile that is fastest. So 65 tiles on 64 processors cost as much as 128, and a width that fills its waves is worth
more than a smaller one that does not: rounding rules (powers of two, multiples of 256) are shadows of this. Attention
is a program for each head and 128 queries; its scores stay on the chip. After Anthony et al., The Case for Co-Designing
Model Architectures with Hardware, arXiv 2401.14489, and NVIDIA's Matrix Multiplication Background user's guide.

Norms, activations, launches and what the L2 cache saves are not in it; attention counts the pairs that a mask hides, and
reads a KV head once for every query head. It was compared with no GPU: it is for ranking shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_targets.cost_model import CostModel
from tilecut_targets.cuda.chips import Chip
from tilecut_targets.price_products import price_products

# Tiles by the share of the largest one's area, with the throughput they are assumed to reach of the largest one's: half
# the area loads 3/2 of the bytes for each product. An assumption, to be measured.
SHARES = {1: 1.0, 2: 0.9, 4: 0.75, 8: 0.55}
QUERIES = 128


def product_ms(m: int, n: int, k: int, chip: Chip, dtype: str) -> float:
    """Milliseconds of [m, k] x [k, n]."""
    rows, columns = chip.tile
    per_processor = chip.tflops[dtype] * 1e9 / chip.processors
    best = math.inf
    for share, throughput in SHARES.items():
        # The longer side is halved first: 128 x 256, 128 x 128, 128 x 64, 64 x 64.
        tall, wide = rows, columns
        for _ in range(share.bit_length() - 1):
            tall, wide = (tall, wide // 2) if wide >= tall else (tall // 2, wide)
        waves = math.ceil(math.ceil(m / tall) * math.ceil(n / wide) / chip.processors)
        best = min(best, waves * 2 * tall * wide * k / (per_processor * throughput))
    return max(best, _bytes_ms(m * k + k * n + m * n, chip, dtype))


def attention_ms(programs: int, queries: int, inner: int, outer: int, chip: Chip, dtype: str) -> float:
    """Milliseconds of one of attention's two products: `programs` heads of [queries, inner] x [inner, outer]."""
    rows = min(QUERIES, max(16, 1 << (queries - 1).bit_length()))
    waves = math.ceil(programs * math.ceil(queries / rows) / chip.processors)
    time = waves * 2 * rows * inner * outer / (chip.tflops[dtype] * 1e9 / chip.processors)
    return max(time, _bytes_ms(programs * (queries + max(inner, outer)) * min(inner, outer), chip, dtype))


def _bytes_ms(numbers: int, chip: Chip, dtype: str) -> float:
    return numbers * (4 if dtype == "float32" else 2) / (chip.gigabytes * 1e6)


def wave_model(
    axes: Axes,
    groups: Sequence[Group],
    sets: Sequence[Sequence[str]],
    at: Mapping[str, int],
    legal: Callable[[Group], list[int]],
    chip: Chip,
    dtype: str,
) -> CostModel:
    """The cost model of a captured model; see `Target.cost`.

    Args:
        legal: the sizes that a group may have after padding.

    Raises:
        ConfigError: there are no groups.
    """
    product = lambda m, n, k: product_ms(m, n, k, chip, dtype)
    attention = lambda programs, queries, inner, outer: attention_ms(programs, queries, inner, outer, chip, dtype)
    facts = {"chip": chip.name, "dtype": dtype, "processors": chip.processors}
    note = f"latency: milliseconds are calculated for {chip.name} in {dtype} by the wave model, not measured"
    return price_products(axes, groups, sets, at, legal, product, attention, facts, note)
