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

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import Axes
from tilecut_passes.count_macs import MacCounter, MacTerm
from tilecut_runtime.errors import ConfigError
from tilecut_targets.cost_model import CALCULATED, CostModel, LayerTable
from tilecut_targets.cuda.chips import Chip

# Tiles by the share of the largest one's area, with the throughput they are assumed to reach of the largest one's: half
# the area loads 3/2 of the bytes for each product. An assumption, to be measured.
SHARES = {1: 1.0, 2: 0.9, 4: 0.75, 8: 0.55}
QUERIES = 128
# Sizes of a layer that are priced one by one; of more, an even choice is, and those between are interpolated.
MOST_POINTS = 2048


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
    if not sets:
        raise ConfigError("latency", "no group of the model can be cut: there is no latency to choose")
    counter = MacCounter(axes, find_groups(axes), at)
    by_name = {g.name: g for g in groups}

    nodes = {n.name: n for n in axes.graph.nodes}
    dense = {term for term in counter.terms if not axes.weights.isdisjoint(nodes[term.node].all_input_nodes)}

    def cost(terms: Sequence[MacTerm], counts: Mapping[str, int]) -> float:
        return sum(_term_ms(term in dense, counter.sizes_of(term, counts), chip, dtype) for term in terms)

    tables: dict[tuple, LayerTable] = {}
    layers = []
    for names in sets:
        grid = _grid([legal(by_name[name]) for name in names])
        terms = counter.terms_of(names)
        signature = tuple((t in dense, *counter.sizes_of(t)) for t in terms), tuple(grid)
        if signature not in tables:
            ms = [cost(terms, dict(zip(names, point))) for point in itertools.product(*grid)]
            tables[signature] = LayerTable(
                [by_name[name].kind for name in names],
                grid,
                np.array(ms).reshape([len(sizes) for sizes in grid]),
                f"{len(terms)} products, {'x'.join(str(sizes[-1]) for sizes in grid)}",
            )
        layers.append((tuple(names), tables[signature]))
    priced = {term for names in sets for term in counter.terms_of(names)}
    rest = cost([t for t in counter.terms if t not in priced], {})
    return CostModel(
        "ms",
        rest,
        1.0,
        tuple(layers),
        facts={
            "chip": chip.name,
            "dtype": dtype,
            "processors": chip.processors,
            "sizes": dict(at),
            "clock": CALCULATED,
        },
        notes=(f"latency: milliseconds are calculated for {chip.name} in {dtype} by the wave model, not measured",),
    )


def _term_ms(dense: bool, sizes: Sequence[int], chip: Chip, dtype: str) -> float:
    """A product with a weight, or one of attention's two."""
    *outer, n, k = sizes
    if dense:
        return product_ms(math.prod(outer), n, k, chip, dtype)
    *programs, m = outer or [1]
    return attention_ms(math.prod(programs), m, k, n, chip, dtype)


def _grid(legal: Sequence[list[int]]) -> tuple[tuple[int, ...], ...]:
    """Every legal size, or an even choice with the least and the greatest where that is too many points."""
    points = max(2, int(MOST_POINTS ** (1 / len(legal))))
    chosen = []
    for sizes in legal:
        places = np.linspace(0, len(sizes) - 1, min(points, len(sizes))).round().astype(int)
        chosen.append(tuple(sizes[i] for i in sorted(set(places.tolist()))))
    return tuple(chosen)
