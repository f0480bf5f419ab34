"""Measure the table of tiles: `python -m tilecut_targets.ascend.measure_tiles`, in the "ascend-kernels" environment.

For every mask, width and block_m, the largest block_n whose plan fits the Atlas A2 without anything switched off. Half an
hour or less on one core. It writes `tiles.json` beside this file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tilecut_targets.ascend.choose_tile import BLOCKS_M, BLOCKS_N, MASKS, TABLE, WIDTHS
from tilecut_targets.ascend.environments import installed
from tilecut_targets.ascend.plan_kernel import ENVIRONMENT, SOURCE, Tile, Variant, plan_kernel


class Soc(NamedTuple):
    """A chip, as `plan_kernel` needs it."""

    soc: str
    family: str


A2 = Soc("Ascend910B3", "a2")


def variant_of(mask: str, width: int) -> Variant:
    """The plainest attention of a row of the table."""
    causal = "bottom_right" if "causal" in mask else "none"
    return Variant(width, width, causal=causal, padding="padding" in mask, tail="tail" in mask)


def measure(mask: str, width: int, folder: Path) -> tuple[dict[str, int], int]:
    """block_m -> largest block_n, and the number of plans that this took."""
    largest: dict[str, int] = {}
    most, plans = BLOCKS_N[-1], 0
    for block_m in BLOCKS_M:
        # More rows never leave room for more keys, nearly: the search goes down only.
        for block_n in sorted((n for n in BLOCKS_N if n <= most), reverse=True):
            plans += 1
            planned = plan_kernel(variant_of(mask, width), Tile(block_m, block_n), A2, folder)
            if planned is not None and not planned.degraded:
                largest[str(block_m)] = most = block_n
                break
        else:
            break
    return largest, plans


def main() -> None:
    """Write the table."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for mask in MASKS:
            for width in WIDTHS:
                largest, plans = measure(mask, width, Path(folder))
                total += plans
                table.setdefault(mask, {})[str(width)] = largest
                print(mask, width, largest, file=sys.stderr, flush=True)
    versions = next(one.versions for one in installed() if one.name == ENVIRONMENT and one.current)
    source = {
        "what": "measured: memory plans of bishengir-compile that fit with nothing switched off",
        "chip": A2.soc,
        "dtype": "float16",
        "plans": total,
        "kernel_sha256": hashlib.sha256(SOURCE.read_bytes()).hexdigest(),
        "triton-ascend": versions["triton-ascend"],
        "bishengir-compile": versions["bishengir-compile"],
    }
    rows = {mask: {w: json.dumps(of) for w, of in by.items()} for mask, by in table.items()}
    text = json.dumps({"source": source, "largest": rows}, indent=1)
    TABLE.write_text(text.replace('"{', "{").replace('}"', "}").replace('\\"', '"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
