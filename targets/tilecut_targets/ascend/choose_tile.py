"""Which tiles of the attention kernel to try for a chip, best first, from the measured table `tiles.json`.

    {"source": {..}, "largest": {mask: {width: {block_m: the largest block_n whose plan fits and is not degraded}}}}

mask is `Variant.mask`; a width takes the row of the next larger one. The table was measured by `measure_tiles.py` on
bishengir-compile, for the Atlas A2; other families start from it too, and every tile is planned anew, so that
the table decides where the search begins, not what is true.

What fits is measured; which of the fitting tiles is fastest is not, since no kernel has run on an NPU. They are ordered by
the bytes that a tile moves for each score: the keys and values, 2 (D + E) / block_m, and the product with the values,
8 E / block_n, which the cube cores write in float32 and the vector cores read (facts of the memory-planned IR: both
go through a workspace in global memory).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tilecut_targets.ascend.plan_kernel import Tile, Variant

TABLE = Path(__file__).with_name("tiles.json")
WIDTHS = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256)
BLOCKS_M = (16, 32, 64, 128, 256)
BLOCKS_N = (16, 32, 64, 128, 256, 512)
MASKS = ("full", "full+tail", "full+tail+padding", "causal", "causal+tail", "causal+tail+padding")


@functools.cache
def read_tiles() -> dict[str, Any]:
    """The table as it stands in the file."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def list_tiles(variant: Variant, nq: int, nk: int) -> Iterator[Tile]:
    """Tiles for at most `nq` queries and `nk` keys, the one that moves the fewest bytes first.

    Without a tail only those that divide nq and nk.
    """
    largest = read_tiles()["largest"][_row(variant.mask)]
    width = min(w for w in WIDTHS if w >= max(variant.width, variant.value_width))
    found = []
    for block_m, most in largest[str(width)].items():
        for block_n in BLOCKS_N:
            tile = Tile(int(block_m), block_n)
            if block_n > most or not _is_useful(tile, nq, nk):
                continue
            if variant.tail or (nq % tile.block_m == 0 and nk % tile.block_n == 0):
                found.append(tile)
    yield from sorted(found, key=lambda tile: (moved_bytes(variant, tile), tile.block_m * tile.block_n))


def moved_bytes(variant: Variant, tile: Tile) -> float:
    """Bytes for each score, of what depends on the tile."""
    return 2 * (variant.width + variant.value_width) / tile.block_m + 8 * variant.value_width / tile.block_n


def _is_useful(tile: Tile, nq: int, nk: int) -> bool:
    """Whether half of the tile would not do: its rows and columns are there."""
    return (tile.block_m == BLOCKS_M[0] or tile.block_m < 2 * nq) and (
        tile.block_n == BLOCKS_N[0] or tile.block_n < 2 * nk
    )


def _row(mask: str) -> str:
    # Padding was measured with tails, which need no less.
    return mask if mask in MASKS else mask.replace("+padding", "+tail+padding")
