"""The table of tiles and its reader, and the chunks of a width."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilecut_runtime.kernels import choose_tile as module
from tilecut_runtime.kernels.choose_tile import DIRECTIONS, Tile, choose_tile, known_arch, read_tiles
from tilecut_runtime.kernels.split_width import split_width


@pytest.fixture
def small_table(monkeypatch):
    tiles = {"forward": {"16": {"64": [128, 64, 4, 2], "128": [64, 64, 4, 2]}}}
    table = {"tiles": {"sm_80": tiles, "sm_90": tiles, "gfx942": tiles}, "like": {"sm_120": "sm_80"}}
    monkeypatch.setattr(module, "read_tiles", lambda: table)
    known_arch.cache_clear()
    yield
    known_arch.cache_clear()


@pytest.mark.parametrize(("width", "block_m"), [(8, 128), (64, 128), (72, 64), (128, 64)])
def test_a_width_takes_the_next_larger_entry(small_table, width, block_m):
    assert choose_tile("sm_90", "forward", width, 16).block_m == block_m


@pytest.mark.parametrize(
    ("arch", "known"),
    [("sm_90", "sm_90"), ("sm_89", "sm_80"), ("sm_100", "sm_90"), ("sm_120", "sm_80"), ("gfx950", "gfx942")],
)
def test_an_architecture_takes_the_nearest_older_one(small_table, caplog, arch, known):
    assert known_arch(arch) == known
    assert ("no tiles for" in caplog.text) == (arch in ("sm_89", "sm_100", "gfx950"))


@pytest.mark.parametrize("arch", ["sm_75", "gfx906"])
def test_an_older_architecture_is_refused(small_table, arch):
    with pytest.raises(KeyError, match=arch):
        known_arch(arch)


def test_every_entry_of_the_table_is_a_tile():
    table = read_tiles()
    assert set(table["like"].values()) <= set(table["tiles"])
    for arch in [*table["tiles"], *table["like"]]:
        for direction in DIRECTIONS:
            for bits in (16, 32):
                for width in range(8, 257, 8):
                    tile = choose_tile(arch, direction, width, bits)
                    assert isinstance(tile, Tile)
                    assert tile.block_m >= 16 and tile.block_n >= 16
                    assert all(side & (side - 1) == 0 for side in tile[:3])


def test_the_reader_needs_the_standard_library_alone():
    code = "import sys, tilecut_runtime.kernels.choose_tile as m; m.read_tiles()"
    code += "; print(sorted({'triton', 'torch'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        (8, [16]),
        (48, [32, 16]),
        (80, [64, 16]),
        (96, [64, 32]),
        (112, [64, 32, 16]),
        (128, [128]),
        (200, [128, 64, 16]),
    ],
)
def test_split_width(width, sizes):
    assert [size for _, size in split_width(width)] == sizes


@given(st.integers(1, 32).map(lambda n: 8 * n))
def test_chunks_cover_the_width_and_pad_only_to_16(width):
    chunks = split_width(width)
    assert [start for start, _ in chunks] == [sum(size for _, size in chunks[:c]) for c in range(len(chunks))]
    assert sum(size for _, size in chunks) == -(-width // 16) * 16
    assert all(size & (size - 1) == 0 for _, size in chunks)
