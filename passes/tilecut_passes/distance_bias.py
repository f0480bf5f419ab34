"""Tell the bias of a causal attention by how far a key stands behind its query, as an attention with a cache reads it.

Before: bias [B|1, H|1, S, S] made of positions and weights (T5's relative positions), or ALiBi's slopes [H]. After: a table
[H, R] with bias[h, i, j] = table[h, min(i - j, R - 1)] + a number a query, which no softmax sees (BLOOM's ALiBi counts a key's
place from the start of the text). The number is that of the query's own place, so that the table begins with 0.

Texts of `PROBED` tokens are looked at: where caches may be longer, a bias that has come to one number, or that falls by
one a place, goes on so.
Refused, with one error: a bias whose pairs at one distance differ by more than such a number, and one that changes otherwise
up to there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from tilecut_passes.graph import arguments, value_of
from tilecut_passes.tabulate_positions import LENGTHS, TabulatePositions, alike
from tilecut_runtime.errors import LoweringError

# The longest text whose pairs are looked at, and how many pairs of all heads: they are S x S x H numbers.
PROBED, MOST_PAIRS = 2048, 150_000_000
WHERE = "AddCache"


def distance_table(tables: TabulatePositions, attention: fx.Node) -> Tensor | None:
    """The table [Hq, R] of an attention's bias and slopes; None where it has neither.

    Raises:
        LoweringError: it is not told by distances.
    """
    a = arguments(attention)
    heads, longest = int(value_of(a["q"]).shape[1]), tables.longest
    found: Tensor | None = None
    if a["bias"] is not None:
        found = _of_bias(tables, a["bias"], heads).expand(heads, -1)
    if a["alibi_slopes"] is not None:
        slopes = tables.value(a["alibi_slopes"], min(2, longest))
        falling = -slopes[:, None].double() * torch.arange(longest)
        if found is not None:
            behind = torch.arange(longest).clamp(max=found.shape[1] - 1)
            falling = falling + found[:, behind]
        found = falling
    return None if found is None else found.to(value_of(a["q"]).dtype).contiguous()


def _of_bias(tables: TabulatePositions, bias: fx.Node, heads: int) -> Tensor:
    """A bias [B|1, H|1, S, S] as float64 [H|1, R], as short as its last distances are alike."""
    probed = min(PROBED, tables.longest, math.isqrt(MOST_PAIRS // heads))
    by_distance = _along_last_query(bias, tables.value(bias, probed))
    for length in {min(n, probed) for n in (*LENGTHS, max(probed // 2, 1))}:
        shorter = _along_last_query(bias, tables.value(bias, length))
        if not alike(shorter, by_distance[:, :length]):
            raise LoweringError(
                WHERE,
                f"{bias.name} holds other numbers for the same distances of a longer text",
                got=f"a difference between {length} and {probed} tokens",
                wanted="numbers that depend on the distance alone: a cache keeps what was computed before",
            )
    same = (by_distance == by_distance[:, -1:]).all(0)
    # The first place from which on all are alike.
    last = int(torch.nonzero(~same).max()) + 1 if not bool(same.all()) else 0
    if tables.longest == probed or last < probed // 2:
        return by_distance[:, : last + 1]
    half = by_distance[:, probed // 2 :]
    falls = (half[:, -1:] - half[:, :1]) / (half.shape[1] - 1)
    if not alike(half, half[:, :1] + falls * torch.arange(half.shape[1])):
        raise LoweringError(
            WHERE,
            f"{bias.name} goes on changing with the distance",
            got=f"neither one number nor a line from {probed // 2} to {probed} places behind a query",
            wanted=f"one of them, or no more than {probed} positions",
            fix=f"give max_length={probed}",
        )
    return torch.cat((by_distance, by_distance[:, -1:] + falls * torch.arange(1, tables.longest - probed + 1)), 1)


def _along_last_query(bias: fx.Node, found: Tensor) -> Tensor:
    """What the last query of bias [1, H, S, S] adds by distance, [H, S], after a check that all queries add the same."""
    pairs = found.reshape(-1, *found.shape[-2:])
    size = max(pairs.shape[-2:])
    behind = torch.arange(size)[:, None] - torch.arange(size)
    tables = []
    for head in pairs.expand(-1, size, size):
        # One head at a time: all of them are gigabytes.
        one = head.double() - head.diagonal().double()[:, None]
        table = one[-1].flip(-1)
        # A bias may count places from the start of the text: it is rounded at that size.
        if not alike(torch.where(behind >= 0, one, 0.0), torch.where(behind >= 0, table[behind.clamp(min=0)], 0.0)):
            raise LoweringError(
                WHERE,
                f"{bias.name} is a bias for pairs of positions that their distance does not tell",
                wanted="the same for all keys so far behind their query",
            )
        tables.append(table)
    return torch.stack(tables)
