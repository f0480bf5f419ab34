"""The order in which tiles are tried."""

import pytest

from tilecut_targets.ascend.choose_tile import (
    BLOCKS_M,
    BLOCKS_N,
    MASKS,
    WIDTHS,
    list_tiles,
    moved_bytes,
    read_tiles,
)
from tilecut_targets.ascend.plan_kernel import SOURCE, Tile, Variant

CAUSAL = Variant(64, 64, causal="bottom_right")


def test_the_table_is_whole_and_of_this_kernel():
    table = read_tiles()
    assert set(table["largest"]) == set(MASKS)
    for rows in table["largest"].values():
        assert set(rows) == {str(width) for width in WIDTHS}
        for largest in rows.values():
            assert set(largest) <= {str(m) for m in BLOCKS_M} and set(largest.values()) <= set(BLOCKS_N)
            # Something fits for few queries and for many.
            assert "16" in largest and "64" in largest
    import hashlib

    assert table["source"]["kernel_sha256"] == hashlib.sha256(SOURCE.read_bytes()).hexdigest()


@pytest.mark.parametrize("mask", MASKS)
def test_masks_name_their_rows(mask):
    causal = "top_left" if "causal" in mask else "none"
    assert Variant(64, 64, causal=causal, padding="padding" in mask, tail="tail" in mask).mask == mask


def test_a_window_takes_the_row_of_a_causal_mask():
    assert Variant(64, 64, left=5).mask == Variant(64, 64, right=5).mask == CAUSAL.mask


def test_the_first_moves_the_fewest_bytes():
    tiles = list(list_tiles(CAUSAL, 4096, 4096))
    moved = [moved_bytes(CAUSAL, tile) for tile in tiles]
    assert moved == sorted(moved) and len(set(tiles)) == len(tiles)
    largest = read_tiles()["largest"][CAUSAL.mask]["64"]
    assert all(tile.block_n <= largest[str(tile.block_m)] for tile in tiles)
    assert Tile(16, 16) in tiles


def test_tiles_are_no_larger_than_what_is_there():
    for nq, nk in ((1, 4096), (128, 128), (100, 70)):
        for tile in list_tiles(CAUSAL, nq, nk):
            assert tile.block_m == 16 or tile.block_m < 2 * nq
            assert tile.block_n < 2 * nk
    assert {tile.block_m for tile in list_tiles(CAUSAL, 1, 4096)} == {16}


def test_without_a_tail_tiles_divide_the_lengths():
    tiles = list(list_tiles(Variant(64, 64, tail=False), 192, 320))
    assert tiles and all(192 % m == 0 and 320 % n == 0 for m, n in tiles)


def test_a_width_takes_the_row_of_the_next_and_the_wider_counts():
    tiles = set(list_tiles(Variant(128, 128), 512, 512))
    assert set(list_tiles(Variant(112, 112), 512, 512)) == tiles
    assert set(list_tiles(Variant(16, 128), 512, 512)) == tiles
