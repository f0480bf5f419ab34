"""What a run costs on an NPU, calculated: fractals in waves of tiles, or bytes, whichever takes longer.

A cube core multiplies two fractals of 16 x 16 fp16 numbers in a cycle, so a product of [M, K] and [K, N] costs in
multiples of 16 of each of them. It is cut into tiles of m x n that fit the core's L0C in float32, and the chip's P cores
make P at a time:

    time = max(ceil(M / m) * ceil(N / n) / P, rounded up, * fractals of a tile / clock;  bytes / bandwidth)

with the tile that is fastest; a tile smaller than the largest loads more bytes for each product, and is assumed to reach
as much less of the peak. float32 products take four times as long where the cube has them, and are made in fp16 where it
has not (ATC's cube_fp16in_fp32out). Attention is a program for each head and 128 queries, in fp16, and its head width
costs what the op's next tiling template does: a preference, no rule.

Norms, activations, launches and what the L2 cache saves are not in it. It was compared with no NPU: it is for ranking
shapes. After the wave model (`cuda/wave_model.py`); fractals: CANN Ascend C guide, cube unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_targets.ascend.chips import FRACTAL, Chip
from tilecut_targets.ascend.legality import family_row, template_width
from tilecut_targets.cost_model import CostModel
from tilecut_targets.price_products import price_products

# Sides of the tiles that are tried, the largest of which CANN's products use on a full L0C.
SIDES = (16, 32, 64, 128, 256)
QUERIES = 128
# How many times longer the cube takes for a float32 product than for an fp16 one.
SINGLE = 4


def product_ms(m: int, n: int, k: int, chip: Chip, dtype: str) -> float:
    """Milliseconds of [m, k] x [k, n]."""
    cube = dtype if dtype in family_row(chip.family)["cube"] else "float16"
    depth = _fractals(k) * (SINGLE if cube == "float32" else 1)
    tiles = [(a, b) for a in SIDES for b in SIDES if a * b * 4 <= chip.l0c]
    most = max(_intensity(a, b) for a, b in tiles)
    best = math.inf
    for tall, wide in tiles:
        waves = math.ceil(math.ceil(m / tall) * math.ceil(n / wide) / chip.cores)
        share = _intensity(tall, wide) / most
        best = min(best, waves * _fractals(min(m, tall)) * _fractals(min(n, wide)) * depth / share)
    return max(_cycles_ms(best, chip), _bytes_ms(m * k + k * n + m * n, chip, cube))


def attention_ms(programs: int, queries: int, inner: int, outer: int, chip: Chip) -> float:
    """Milliseconds of one of attention's two products: `programs` heads of [queries, inner] x [inner, outer]."""
    width, keys = sorted((inner, outer))
    width = template_width(chip.family, width)
    waves = math.ceil(programs * math.ceil(queries / QUERIES) / chip.cores)
    cycles = waves * _fractals(min(queries, QUERIES)) * _fractals(width) * _fractals(keys)
    return max(_cycles_ms(cycles, chip), _bytes_ms(programs * (queries + keys) * width, chip, "float16"))


def fractal_model(
    axes: Axes,
    groups: Sequence[Group],
    sets: Sequence[Sequence[str]],
    at: Mapping[str, int],
    legal: Callable[[Group], list[int]],
    chip: Chip,
    dtype: str,
) -> CostModel:
    """The cost model of a captured model; see `Target.cost` and `price_products`."""
    product = lambda m, n, k: product_ms(m, n, k, chip, dtype)
    attention = lambda programs, queries, inner, outer: attention_ms(programs, queries, inner, outer, chip)
    facts = {"chip": chip.soc, "dtype": dtype, "processors": chip.cores}
    note = f"latency: milliseconds are calculated for {chip.soc} in {dtype} by the fractal model, not measured"
    return price_products(axes, groups, sets, at, legal, product, attention, facts, note)


def _fractals(n: int) -> int:
    return -(-n // FRACTAL)


def _intensity(rows: int, columns: int) -> float:
    """Products for each number that a tile loads."""
    return rows * columns / (rows + columns)


def _cycles_ms(cycles: float, chip: Chip) -> float:
    return cycles / (chip.gigahertz * 1e6)


def _bytes_ms(numbers: int, chip: Chip, dtype: str) -> float:
    return numbers * (4 if dtype == "float32" else 2) / (chip.gigabytes * 1e6)
