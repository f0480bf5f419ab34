"""The table of tiles, `tiles.json`: which tile a kernel runs with on an architecture. Standard library only.

    {"tiles": {arch: {direction: {"16"|"32": {width: [block_m, block_n, num_warps, num_stages]}}}}, "like": {arch: arch}}

A width takes the entry of the next larger one. An architecture without entries takes those that `like` names, else
those of the nearest older one of its family, which is logged. The table is written by
`python -m tilecut_targets.cuda.choose_tiles`.

What `tilecut tune` measured on this machine comes before it, for the very widths that were measured: `tiles.json` in
tilecut's cache, of the same form.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

DIRECTIONS = ("forward", "decode", "dq", "dkdv")
TABLE = Path(__file__).with_name("tiles.json")

log = logging.getLogger(__name__)


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys, and the launch that goes with them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tile(arch: str, direction: str, width: int, bits: int) -> Tile:
    """The tile of an architecture ("sm_90", "gfx942") for the larger of the head widths, of 16 or 32 bits.

    Raises:
        KeyError: a family of architectures that the table does not know.
    """
    measured = measured_tiles().get(arch, {}).get(direction, {}).get(str(bits), {}).get(str(width))
    return Tile(*measured) if measured is not None else shipped_tile(arch, direction, width, bits)


def shipped_tile(arch: str, direction: str, width: int, bits: int) -> Tile:
    """`choose_tile` without what was measured on this machine."""
    entries = read_tiles()["tiles"][known_arch(arch)][direction][str(bits)]
    return Tile(*entries[str(min(int(w) for w in entries if int(w) >= width))])


@functools.cache
def read_tiles() -> dict:
    """The table as it stands in the file."""
    return json.loads(TABLE.read_text())


def measured_table() -> Path:
    """Where `tilecut tune` keeps what it measured: in TILECUT_CACHE, else ~/.cache/tilecut."""
    return Path(os.environ.get("TILECUT_CACHE") or Path.home() / ".cache" / "tilecut") / "tiles.json"


@functools.cache
def measured_tiles() -> dict:
    """The measured tiles of this machine, by architecture."""
    return read_measured(measured_table())


def read_measured(path: Path) -> dict:
    """The tiles in a measured table; none where there is no file, or a damaged one, which is logged."""
    if not path.is_file():
        return {}
    try:
        tiles = json.loads(path.read_text())["tiles"]
        for entries in (by for kinds in tiles.values() for bits in kinds.values() for by in bits.values()):
            for tile in entries.values():
                _check_tile(Tile(*tile))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        log.warning("%s is no table of tiles (%s: %s): it is not used", path, type(e).__name__, e)
        return {}
    return tiles


def _check_tile(tile: Tile) -> None:
    """Raise ValueError for numbers that no tile has."""
    for name, value, most in zip(tile._fields, tile, (256, 512, 16, 8)):
        if type(value) is not int or not 1 <= value <= most or (name != "num_stages" and value & (value - 1)):
            raise ValueError(f"{name} is {value!r}")


@functools.cache
def known_arch(arch: str) -> str:
    """The architecture whose tiles an architecture takes."""
    table = read_tiles()
    if arch in table["tiles"]:
        return arch
    if arch in table["like"]:
        return table["like"][arch]
    family, number = _parse(arch)
    older = [known for known in table["tiles"] if _parse(known)[0] == family and _parse(known)[1] < number]
    if not older:
        raise KeyError(f"no tiles for {arch}; known: {', '.join(table['tiles'])}")
    nearest = max(older, key=lambda known: _parse(known)[1])
    log.warning("no tiles for %s: those of %s are used", arch, nearest)
    return nearest


def _parse(arch: str) -> tuple[str, int]:
    """("sm_", 0x90) of "sm_90": AMD counts in base 16, and NVIDIA's numbers keep their order in it."""
    found = re.fullmatch(r"(sm_|gfx)([0-9a-f]+)", arch)
    if not found:
        raise KeyError(f"not an architecture: {arch}")
    return found[1], int(found[2], 16)
