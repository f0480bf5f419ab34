"""Memory plans of the attention kernel by the real compiler: within the chip's memories, and none degraded."""

from typing import NamedTuple

import pytest

from tilecut_runtime.errors import LoweringError
from tilecut_targets.ascend import build_kernels
from tilecut_targets.ascend import plan_kernel as plans
from tilecut_targets.ascend.build_kernels import choose
from tilecut_targets.ascend.list_kernels import Wanted
from tilecut_targets.ascend.plan_kernel import Tile, Variant, compiler_options, plan_kernel

WIDTHS = (16, 32, 48, 64, 80, 96, 128, 192, 256)
KIB = 1024


class Soc(NamedTuple):
    soc: str
    family: str


A2, A3, A950 = Soc("Ascend910B3", "a2"), Soc("Ascend910_9391", "a3"), Soc("Ascend950PR_9589", "a950")
UB = {"a2": 192 * KIB, "a3": 192 * KIB, "a950": 248 * KIB}
L0C = {"a2": 128 * KIB, "a3": 128 * KIB, "a950": 256 * KIB}


def check(variant: Variant, chip: Soc, folder, length: int = 128) -> None:
    planned = choose(Wanted(variant, length, length, ("attention",)), chip, folder)
    assert not planned.degraded, planned
    memories = planned.memories
    assert [m.capacity for m in memories.values()] == [UB[chip.family], 512 * KIB, L0C[chip.family]]
    assert all(0 < m.used <= m.capacity for m in memories.values()), planned
    # The cube multiplies BLOCK_M rows of queries with the keys: at least they are in L1.
    assert memories["l1"].used >= 2 * planned.tile.block_m * variant.width


def variants(width: int) -> list[Variant]:
    return [Variant(width, width, padding=True), Variant(width, width, causal="bottom_right")]


@pytest.mark.toolchain("ascend-kernels")
@pytest.mark.parametrize("width", WIDTHS)
def test_a2(width, tmp_path):
    for variant in variants(width):
        check(variant, A2, tmp_path)


@pytest.mark.toolchain("ascend-kernels")
def test_a3(tmp_path):
    check(Variant(64, 64, "bfloat16", causal="top_left", padding=True), A3, tmp_path)


@pytest.mark.toolchain("ascend-kernels")
def test_950(tmp_path):
    check(Variant(64, 64, causal="bottom_right"), A950, tmp_path)


@pytest.mark.slow
@pytest.mark.toolchain("ascend-kernels")
@pytest.mark.parametrize("chip", [A3, A950], ids=lambda chip: chip.family)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_elsewhere(width, chip, tmp_path):
    for variant in variants(width):
        check(variant, chip, tmp_path)


@pytest.mark.slow
@pytest.mark.toolchain("ascend-kernels")
@pytest.mark.parametrize("width", WIDTHS)
def test_other_masks(width, tmp_path):
    check(Variant(width, width, causal="bottom_right", padding=True), A2, tmp_path, length=4096)
    for variant in (
        Variant(width, width, tail=False),
        Variant(width, width, causal="bottom_right", tail=False),
        Variant(width, width, causal="bottom_right", padding=True, left=100),
        Variant(width, 16, "bfloat16", padding=True, left=64, right=32),
    ):
        check(variant, A2, tmp_path)


@pytest.mark.toolchain("ascend-kernels")
def test_what_does_not_fit(tmp_path):
    assert plan_kernel(Variant(128, 128, causal="bottom_right"), Tile(256, 512), A2, tmp_path) is None
    assert not (tmp_path / plans.PLAN).exists()


@pytest.mark.toolchain("ascend-kernels")
def test_a_smaller_tile_is_taken_where_the_compiler_degrades_one(tmp_path, monkeypatch):
    """64 x 256 fits at width 256 only with double buffering off, which the compiler decides by itself."""
    variant, degraded = Variant(256, 256), Tile(64, 256)
    planned = plan_kernel(variant, degraded, A2, tmp_path)
    assert planned.degraded and "enable-auto-multi-buffer" in planned.retries
    wanted = Wanted(variant, 512, 512, ("attention",))
    for tiles, chosen in (([Tile(256, 512), degraded, Tile(64, 64)], Tile(64, 64)), ([degraded], degraded)):
        monkeypatch.setattr(build_kernels, "list_tiles", lambda *_, tiles=tiles: tiles)
        planned = choose(wanted, A2, tmp_path)
        assert planned.tile == chosen and planned.degraded == (chosen == degraded)
    monkeypatch.setattr(build_kernels, "list_tiles", lambda *_: [Tile(256, 512)])
    with pytest.raises(LoweringError, match="no tile of attention_d256 fits Ascend910B3"):
        choose(wanted, A2, tmp_path)


def test_a_degraded_plan_is_seen(monkeypatch, tmp_path):
    plan = '"UB_SIZE", 80 "L1_SIZE", 80 "L0C_SIZE", 80\n'

    def answer(*_):
        (tmp_path / plans.PLAN).write_text(plan)
        note = (
            "[NOTE] Ub overflow detected; automatically set enable-auto-multi-buffer to false and retrying compilation."
        )
        return {"planned": True, "messages": [note]}

    monkeypatch.setattr(plans, "call", answer)
    planned = plan_kernel(Variant(64, 64), Tile(16, 16), A2, tmp_path)
    assert planned.degraded and planned.retries == ("enable-auto-multi-buffer",)


def test_names_and_options():
    assert Variant(64, 64).name == "attention_d64"
    whole = Variant(64, 48, "bfloat16", "bottom_right", 5, -1, True, False)
    assert whole.name == "attention_d64_e48_bf16_bottom_right_window_5_all_padding_whole"
    assert compiler_options(A2)[0] == "--target=Ascend910B3" and "--enable-auto-multi-buffer=true" in compiler_options(
        A2
    )
    assert "--enable-auto-multi-buffer=false" in compiler_options(A950)
