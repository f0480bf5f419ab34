"""How busy a list of attention tiles keeps a GPU, computed and not measured: natural order beside heaviest first.

    python benchmarks/tile_list_efficiency.py

A packed causal batch of 32 sequences, lengths uniform in 1..1024, on 132 processors with two programs each. A program
takes a time proportional to its tiles of keys plus a start of two; it begins as soon as a place is free, in the order
of the list. Efficiency is the work over what all places could have done until the last program ended.
"""

from __future__ import annotations

import heapq

import torch

from tilecut_runtime.list_tiles import list_tiles

PLACES = 2 * 132
BLOCK_M, BLOCK_N, START = 128, 128, 2
SEQUENCES, LONGEST = 32, 1024
HEADS = (2, 4, 8, 16)


def makespan(times: list[float], places: int) -> float:
    """When the last program ends, each starting in turn on the first free place."""
    free = [0.0] * places
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def times_of(tiles: list[tuple[int, int]], lengths: list[int], heads: int) -> list[float]:
    """One time for each head of each (sequence, tile), as the grid has them."""
    seen = [min(lengths[s], (tile + 1) * BLOCK_M) for s, tile in tiles]
    return [START + -(-keys // BLOCK_N) for keys in seen for _ in range(heads)]


def efficiency(tiles: list[tuple[int, int]], lengths: list[int], heads: int) -> float:
    times = times_of(tiles, lengths, heads)
    return sum(times) / (PLACES * makespan(times, PLACES))


def orders(lengths: list[int]) -> dict[str, list[tuple[int, int]]]:
    """The tiles as they come, and as `list_tiles` has them."""
    natural = [(s, tile) for s, n in enumerate(lengths) for tile in range(-(-n // BLOCK_M))]
    rows = torch.tensor(lengths)
    spans = (rows, torch.full_like(rows, LONGEST), torch.zeros_like(rows))
    listed = list_tiles(rows, sum(lengths), LONGEST, BLOCK_M, spans).tolist()
    return {"natural": natural, "heaviest first": [(s, tile) for s, tile in listed if s >= 0]}


def table(seed: int = 0) -> dict[int, dict[str, float]]:
    """Efficiency by heads and order."""
    lengths = torch.randint(1, LONGEST + 1, (SEQUENCES,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {h: {name: efficiency(tiles, lengths, h) for name, tiles in orders(lengths).items()} for h in HEADS}


def main() -> None:
    print("| heads | natural order | heaviest first |\n|---|---|---|")
    for heads, row in table().items():
        print(f"| {heads} | {row['natural']:.2f} | {row['heaviest first']:.2f} |")


if __name__ == "__main__":
    main()
