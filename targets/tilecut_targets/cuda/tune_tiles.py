"""Measure on the GPU that is here which tiles the attention kernels run fastest with, and keep them for this machine.

For each direction and head width the candidates of `choose_tiles`, with one to four stages, run on one problem; those
that give other numbers than the table's tile, or do not run, are out. The fastest goes into the table of this machine
(`choose_tile.measured_table`), which comes before the shipped one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from tilecut_runtime.errors import ConfigError, InputError
from tilecut_runtime.kernels.choose_tile import DIRECTIONS, Tile, choose_tile, measured_tiles, read_measured
from tilecut_runtime.launch_attention import architecture, backward, forward
from tilecut_targets.cuda.choose_tiles import candidates

WHERE = "tune"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STAGES = (1, 2, 3, 4)
ROUNDS = 7
# A tile must be this much faster than the table's to take its place.
GAIN = 0.02


@dataclass(frozen=True)
class Shape:
    """The problem to measure: dense and causal; decode has one query to `keys` keys."""

    batch: int = 4
    heads: int = 16
    kv_heads: int = 4
    length: int = 2048
    keys: int = 8192


@dataclass(frozen=True)
class Row:
    """What came of one direction and width: milliseconds of the table's tile and of the fastest, and how many ran."""

    arch: str
    direction: str
    dtype: str
    width: int
    before: Tile
    before_ms: float
    best: Tile
    best_ms: float
    ran: int
    refused: int

    @property
    def better(self) -> bool:
        """Whether the fastest is worth an entry."""
        return self.best_ms < self.before_ms * (1 - GAIN)


def tune(
    widths: Iterable[int],
    dtype: str = "bfloat16",
    directions: Sequence[str] = DIRECTIONS,
    device: str = "cuda",
    shape: Shape | None = None,
    rounds: int = ROUNDS,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure every direction and width; writes nothing.

    Raises:
        ConfigError: no such device, type or direction.
        InputError: a width that the kernels do not take.
    """
    if dtype not in DTYPES:
        raise ConfigError(WHERE, "unknown type", got=dtype, wanted=" or ".join(DTYPES))
    if unknown := [d for d in directions if d not in DIRECTIONS]:
        raise ConfigError(WHERE, "unknown direction", got=unknown[0], wanted=" or ".join(DIRECTIONS))
    widths = list(widths)
    if wrong := [w for w in widths if w % 8 or not 8 <= w <= 256]:
        raise InputError(WHERE, "no such head width", got=wrong[0], wanted="a multiple of 8 up to 256")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(WHERE, "no CUDA device on this machine", fix="run it where the GPU is")
    rows = []
    for width in widths:
        for direction in directions:
            rows.append(_tune_one(direction, width, dtype, torch.device(device), shape or Shape(), rounds))
            tell(rows[-1])
    return rows


def write_measured(rows: Iterable[Row], path: Path) -> int:
    """Put what is better into the machine's table, beside what is there; returns the number of entries."""
    tiles = read_measured(path)
    written = 0
    for row in rows:
        if row.better:
            by_bits = tiles.setdefault(row.arch, {}).setdefault(row.direction, {})
            by_bits.setdefault("32" if row.dtype == "float32" else "16", {})[str(row.width)] = list(row.best)
            written += 1
    if written:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"tiles": tiles}, file, indent=1)
        os.replace(name, path)
        measured_tiles.cache_clear()
    return written


def _tune_one(direction: str, width: int, dtype: str, device: torch.device, shape: Shape, rounds: int) -> Row:
    arch, bits = architecture(device), 32 if dtype == "float32" else 16
    before = choose_tile(arch, direction, width, bits)
    run = _problem(direction, width, DTYPES[dtype], device, shape)
    want = run(before)
    tried = {before: _milliseconds(lambda: run(before), device, rounds)}
    refused = 0
    for tile in _stages(candidates(arch, direction, width, bits)):
        if tile in tried:
            continue
        if _agrees(run, tile, want):
            tried[tile] = _milliseconds(lambda tile=tile: run(tile), device, rounds)
        else:
            refused += 1
    best = min(tried, key=tried.__getitem__)
    return Row(arch, direction, dtype, width, before, tried[before], best, tried[best], len(tried), refused)


def _stages(tiles: Iterable[Tile]) -> list[Tile]:
    return list(dict.fromkeys(tile._replace(num_stages=stages) for tile in tiles for stages in STAGES))


def _problem(
    direction: str, width: int, dtype: torch.dtype, device: torch.device, shape: Shape
) -> Callable[[Tile], tuple[Tensor, ...]]:
    """What runs the kernels of a direction with a tile, and returns what they made."""
    generator = torch.Generator(device).manual_seed(0)
    queries, keys = (1, shape.keys) if direction == "decode" else (shape.length, shape.length)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(shape.batch, heads, length, width, generator=generator, device=device).to(dtype)

    q, k, v = draw(shape.heads, queries), draw(shape.kv_heads, keys), draw(shape.kv_heads, keys)
    options = {"max_q": queries, "max_k": keys, "scale": width**-0.5, "causal": "bottom_right", "window": (-1, -1)}
    options |= {"global_tokens": 0, "softcap": 0.0, "dropout_p": 0.0}
    arch, bits = architecture(device), 8 * q.element_size()
    tiles = {d: choose_tile(arch, d, width, bits) for d in DIRECTIONS}
    if direction in ("forward", "decode"):
        return lambda tile: forward(q, k, v, tiles={**tiles, direction: tile}, **options)
    out, lse = forward(q, k, v, **options)
    grad = torch.randn_like(out)
    return lambda tile: backward(grad, q, k, v, out, lse, tiles={**tiles, direction: tile}, **options)[:3]


def _agrees(run: Callable[[Tile], tuple[Tensor, ...]], tile: Tile, want: tuple[Tensor, ...]) -> bool:
    """Whether a tile compiles, fits, and gives the numbers of the table's."""
    try:
        got = run(tile)
    # Triton and its compilers raise their own for what does not fit: OutOfResources, PassManager and ptxas errors.
    except Exception:
        return False
    tolerance = 2e-2 if want[0].element_size() == 2 else 1e-4
    return all(bool(((a - b).abs().max() <= tolerance * b.abs().max()).item()) for a, b in zip(got, want))


def _milliseconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of some runs. On a GPU as a CUDA graph, since a launch from Python may take longer than the kernel."""
    if device.type == "cuda":
        return float(do_bench_cudagraph(run, rep=10 * rounds, return_mode="median"))  # type: ignore[arg-type]
    times = []
    for _ in range(rounds):
        before = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def as_rows(rows: Iterable[Row]) -> list[dict]:
    """Rows as JSON."""
    return [{**dataclasses.asdict(row), "better": row.better} for row in rows]
