"""Make the table of tiles without a GPU: of the candidates, in order of preference, the first that compiles clean.

    python -m tilecut_targets.cuda.choose_tiles [ARCH...]

writes runtime/tilecut_runtime/kernels/tiles.json. Clean: within the shared memory of the architecture and of those that
take its tiles, and no spills in any of its `launches`; where every candidate spills, the one that spills least. Which of
two clean tiles is faster only a GPU can tell: the order of preference, larger tiles first (fewer bytes read for each
product), is an assumption until it is measured.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence

from tilecut_runtime.errors import LoweringError
from tilecut_runtime.kernels.choose_tile import DIRECTIONS, TABLE, Tile
from tilecut_targets.cuda.chips import ARCHS as PROMISED
from tilecut_targets.cuda.chips import SHARED_LIMIT
from tilecut_targets.cuda.compile_kernels import Binary, Variant, compile_kernel

WIDTHS = {16: (16, 32, 64, 96, 128, 192, 256), 32: (32, 64, 128, 256)}
ARCHS = ("sm_80", "sm_90", "sm_100")
# Exact float32 uses no matrix instructions: its tiles are chosen here and taken everywhere, so this one goes first.
PLAIN = "sm_80"
# The same instructions and registers. sm_120 belongs with sm_89, not with the data-centre parts that came before it.
LIKE = {
    "sm_86": "sm_80",
    "sm_87": "sm_80",
    "sm_89": "sm_80",
    "sm_103": "sm_100",
    "sm_120": "sm_80",
    "sm_121": "sm_80",
}
PACKED = ("CuQ", "CuK", "Tiles")

# Preference, of 16-bit types. wgmma (sm_90) wants 64 rows to a group of four warps.
LARGE = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)]
SMALL = [(64, 16, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1), (16, 16, 4, 1)]
FORWARD = {
    "sm_90": [*LARGE, *SMALL],
    "sm_100": [*LARGE[1:2], *LARGE[3:], *SMALL],
    "": [(128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2), *SMALL],
}
DQ = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)]
DKDV = [(64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1), (16, 16, 4, 1)]
DECODE = [(16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)]
# Exact products of float32 have no matrix instructions: threads hold the operands, and tiles are small.
EXACT = [(64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1)]
EXACT_DECODE = [(16, 32, 4, 2), (16, 16, 4, 1)]


def candidates(arch: str, direction: str, width: int, bits: int) -> Sequence[Tile]:
    """What to try, best first."""
    if direction == "decode":
        return [Tile(*c) for c in (DECODE if bits == 16 else EXACT_DECODE)]
    if bits == 32:
        # Wider ones spill backwards whatever the tile.
        return [Tile(*c) for c in (EXACT if direction == "forward" or width <= 64 else EXACT[-1:])]
    forward = FORWARD.get(arch, FORWARD[""])
    return [Tile(*c) for c in {"forward": forward, "dq": DQ, "dkdv": DKDV}[direction]]


def launches(arch: str, direction: str, width: int, bits: int) -> list[tuple[str, Variant]]:
    """The causal launches, by architecture, that a tile is judged by.

    Where no spills are promised: packed and dense, on every architecture that takes the tile. Wide backward tiles all but
    spill, and larger ones with a few spills elsewhere are worth more than small ones with none.
    """
    packed = ("CuQ", "CuK") if direction == "decode" else PACKED
    variants = [Variant(width, dtype="bf16" if bits == 16 else "fp32", inputs=inputs) for inputs in (packed, ())]
    if direction in ("dq", "dkdv") and width > 64:
        return [(arch, variants[0])]
    return list(itertools.product(takers(arch), variants))


def takers(arch: str) -> list[str]:
    """Those of the promised architectures that take an architecture's tiles, itself among them."""
    return [a for a in PROMISED if LIKE.get(a, a) == arch]


def shared_limit(arch: str) -> int:
    """Bytes of shared memory on an architecture and on every one that takes its tiles."""
    return min(limit for a, limit in SHARED_LIMIT.items() if LIKE.get(a, a) == arch)


def choose(arch: str, direction: str, width: int, bits: int) -> tuple[Tile, Sequence[Binary]]:
    """The tile, and its binaries: one for each launch if none spills.

    Raises:
        LoweringError: no candidate fits the shared memory.
    """
    tried = []
    for tile in candidates(arch, direction, width, bits):
        binaries = []
        for taker, variant in launches(arch, direction, width, bits):
            try:
                binaries.append(compile_kernel(direction, taker, variant, tile))
            except LoweringError:
                break
            if binaries[-1].spills or binaries[-1].shared > shared_limit(arch):
                break
        else:
            return tile, binaries
        if binaries and binaries[-1].shared <= shared_limit(arch):
            tried.append((tile, binaries))
    if not tried:
        raise LoweringError("choose_tiles", "no candidate fits", got=f"{direction} of width {width} on {arch}")
    return min(tried, key=lambda entry: entry[1][-1].spills)


def main(archs: Sequence[str]) -> None:
    """Write the table; architectures that are not named keep their entries, PLAIN must be there or come first."""
    for arch in archs:
        tiles: dict[str, dict] = {}
        for direction in DIRECTIONS:
            for bits, width in ((bits, width) for bits, widths in WIDTHS.items() for width in widths):
                if bits == 32 and arch != PLAIN:
                    continue
                tile, binaries = choose(arch, direction, width, bits)
                tiles.setdefault(direction, {}).setdefault(str(bits), {})[str(width)] = list(tile)
                found = ", ".join(
                    f"{b.arch} {b.shared} B, {b.registers} registers, {b.spills} spills" for b in binaries
                )
                print(f"{arch} {direction} {bits} {width}: {list(tile)}: {found}", flush=True)
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {"tiles": {}}
        table["tiles"] = dict(sorted({**table["tiles"], arch: tiles}.items()))
        copy_plain(table["tiles"])
        table["like"] = LIKE
        TABLE.write_text(_format(table))


def copy_plain(tiles: dict[str, dict]) -> None:
    """Give every architecture the float32 tiles of PLAIN."""
    for held in tiles.values():
        for direction in DIRECTIONS:
            held[direction]["32"] = tiles[PLAIN][direction]["32"]


def _format(table: dict) -> str:
    """JSON with one line for each architecture, direction and type."""
    lines = []
    for arch, directions in table["tiles"].items():
        rows = [
            f'      "{direction}": {{\n'
            + ",\n".join(f'        "{bits}": {json.dumps(row)}' for bits, row in by.items())
            + "\n      }"
            for direction, by in directions.items()
        ]
        lines.append(f'    "{arch}": {{\n' + ",\n".join(rows) + "\n    }")
    return '{\n  "tiles": {\n' + ",\n".join(lines) + f'\n  }},\n  "like": {json.dumps(table["like"])}\n}}\n'


if __name__ == "__main__":
    main(sys.argv[1:] or ARCHS)
