"""`tilecut tune`: it runs the kernels (here in triton's interpreter), and what it writes is what launches take."""

import json
import os
import subprocess
import sys

import pytest
import torch

from checks import ROOT
from tilecut_runtime.errors import ConfigError, InputError
from tilecut_runtime.kernels import choose_tile as tiles
from tilecut_runtime.kernels.choose_tile import Tile, choose_tile, measured_table, measured_tiles, shipped_tile
from tilecut_targets.cuda import tune_tiles
from tilecut_targets.cuda.tune_tiles import Row, tune, write_measured

BEFORE, BEST = Tile(128, 128, 8, 3), Tile(128, 64, 4, 1)


def row(direction="forward", width=64, best_ms=1.0, arch="sm_90", dtype="bfloat16"):
    return Row(arch, direction, dtype, width, BEFORE, 2.0, BEST, best_ms, 9, 1)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILECUT_CACHE", str(tmp_path))
    measured_tiles.cache_clear()
    yield tmp_path / "tiles.json"
    measured_tiles.cache_clear()


def test_what_is_better_is_kept_and_taken_for_its_width_alone(own_cache):
    shipped = {w: choose_tile("sm_90", "forward", w, 16) for w in (56, 64, 72)}
    assert write_measured([row(), row("dq", best_ms=1.99), row(dtype="float32", width=32)], measured_table()) == 2
    assert choose_tile("sm_90", "forward", 64, 16) == BEST
    assert choose_tile("sm_90", "forward", 32, 32) == BEST
    assert choose_tile("sm_90", "forward", 56, 16) == shipped[56]
    assert choose_tile("sm_90", "forward", 72, 16) == shipped[72]
    assert choose_tile("sm_89", "forward", 64, 16) != BEST
    assert write_measured([row("decode")], measured_table()) == 1
    assert choose_tile("sm_90", "decode", 64, 16) == choose_tile("sm_90", "forward", 64, 16) == BEST
    assert set(json.loads(own_cache.read_text())["tiles"]["sm_90"]) == {"forward", "decode"}


def test_another_table_keeps_what_it_has(own_cache, tmp_path):
    other = tmp_path / "other.json"
    assert write_measured([row(width=64)], other) == write_measured([row(width=128)], other) == 1
    assert set(json.loads(other.read_text())["tiles"]["sm_90"]["forward"]["16"]) == {"64", "128"}
    assert not own_cache.exists()


def test_what_is_shipped_stays_what_it_is(own_cache):
    before = shipped_tile("sm_90", "forward", 64, 16)
    write_measured([row()], measured_table())
    assert shipped_tile("sm_90", "forward", 64, 16) == before != choose_tile("sm_90", "forward", 64, 16)


def test_nothing_better_writes_nothing(own_cache):
    assert write_measured([row(best_ms=2.0)], measured_table()) == 0
    assert not own_cache.exists()


def one_tile(*tile):
    return json.dumps({"tiles": {"sm_90": {"forward": {"16": {"64": tile}}}}})


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"tiles": 3}', "[" * 100_000, one_tile(1, 2), one_tile("64", "64", "4", "2"), one_tile(48, 64, 4, 2),
        one_tile(64, 64, 3, 2), one_tile(64.0, 64, 4, 2), one_tile(True, 64, 4, 2), one_tile(1024, 64, 4, 2),
        one_tile(64, 64, 4, 100),
    ],
)  # fmt: skip
def test_a_damaged_table_is_said_and_not_used(own_cache, text, caplog):
    own_cache.write_text(text)
    assert choose_tile("sm_90", "forward", 64, 16) == Tile(*tiles.read_tiles()["tiles"]["sm_90"]["forward"]["16"]["64"])
    assert "is no table of tiles" in caplog.text


SCRIPT = """
import json
from tilecut_targets.cuda.tune_tiles import Shape, as_rows, tune
rows = tune([24], "float16", device="cpu", shape=Shape(1, 1, 1, 18, 20), rounds=1)
print(json.dumps(as_rows(rows)))
"""


def test_every_direction_is_measured_and_compared(tmp_path):
    paths = os.pathsep.join(str(ROOT / name) for name in ("toolchain", "passes", "targets", "runtime"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout)
    assert [r["direction"] for r in rows] == ["forward", "decode", "dq", "dkdv"]
    for r in rows:
        assert r["ran"] > 5 and r["refused"] == 0 and r["best_ms"] <= r["before_ms"]


def test_a_tile_that_fails_or_gives_other_numbers_is_out(monkeypatch):
    good, wrong, broken = Tile(64, 64, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)

    def run(tile):
        if tile[:2] == broken[:2]:
            raise RuntimeError("out of shared memory")
        return (torch.zeros(3) if tile[:2] == wrong[:2] else torch.ones(3),)

    monkeypatch.setattr(tune_tiles, "_problem", lambda *given: run)
    monkeypatch.setattr(tune_tiles, "candidates", lambda *given: [good, wrong, broken])
    monkeypatch.setattr(tune_tiles, "choose_tile", lambda *given: BEFORE)
    (found,) = tune([64], "bfloat16", ["forward"], "cpu")
    assert found.refused == 8 and found.ran == 5


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (([64], "int8", ["forward"], "cpu"), ConfigError, "unknown type; got int8"),
        (([64], "float16", ["backward"], "cpu"), ConfigError, "unknown direction; got backward"),
        (([65], "float16", ["forward"], "cpu"), InputError, "no such head width; got 65"),
        pytest.param(
            ([64], "float16", ["forward"], "cuda"), ConfigError, "no CUDA device on this machine",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here"),
        ),
    ],
)  # fmt: skip
def test_bad_wishes(given, error, message):
    with pytest.raises(error, match=message):
        tune(*given)
