"""The table of tiles, `tiles.json`: which tile a kernel runs with on an architecture. Standard library only.

    {"tiles": {arch: {direction: {"16"|"32": {width: [block_m, block_n, num_warps, num_stages]}}}}, "like": {arch: arch}}

A width takes the entry of the next larger one. An architecture without entries takes those that `like` names, else
those of the nearest older one of its family, which is logged. The table is written by
`python -m tilecut_targets.cuda.choose_tiles`.
"""

from __future__ import annotations

import functools
import json
import logging
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
    entries = read_tiles()["tiles"][known_arch(arch)][direction][str(bits)]
    return Tile(*entries[str(min(int(w) for w in entries if int(w) >= width))])


@functools.cache
def read_tiles() -> dict:
    """The table as it stands in the file."""
    return json.loads(TABLE.read_text())


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
