"""The simulation behind docs/cuda_kernels.md: what it computes, and that the list it is about helps."""

import pytest

from tile_list_efficiency import HEADS, makespan, orders, table, times_of


@pytest.mark.parametrize(
    ("times", "places", "end"), [([3, 1, 1, 1], 2, 3), ([1, 1, 1, 3], 2, 4), ([2, 2], 1, 4), ([5], 4, 5)]
)
def test_makespan(times, places, end):
    assert makespan(times, places) == end


def test_both_orders_hold_the_same_work():
    lengths = [300, 5, 1024]
    natural, heavy = (times_of(tiles, lengths, 2) for tiles in orders(lengths).values())
    assert sorted(natural) == sorted(heavy)
    assert heavy == sorted(heavy, reverse=True)


def test_heaviest_first_is_never_worse():
    rows = table()
    assert list(rows) == list(HEADS)
    assert all(row["heaviest first"] >= row["natural"] for row in rows.values())
