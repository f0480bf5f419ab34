"""The kernel as triton-ascend and bishengir-compile lower it, run on this CPU against float64."""

from typing import NamedTuple

import pytest

from tilecut_targets.ascend.plan_kernel import LINALG, Tile, Variant, plan_kernel
from tilecut_targets.ascend.run_kernel import LIMITS, Problem, run_kernel


class Soc(NamedTuple):
    soc: str
    family: str


A2, A950 = Soc("Ascend910B3", "a2"), Soc("Ascend950PR_9589", "a950")
QUICK = [
    ("linalg", A2, Variant(64, 64, causal="bottom_right", padding=True), Tile(32, 64)),
    ("hfusion", A2, Variant(64, 64, causal="bottom_right", padding=True), Tile(32, 64)),
    ("linalg", A2, Variant(80, 48, "bfloat16"), Tile(16, 32)),
    ("linalg", A950, Variant(32, 32, causal="top_left", left=20), Tile(16, 32)),
]
SLOW = [
    (stage, A2, variant, Tile(64, 64))
    for stage in ("linalg", "hfusion")
    for variant in (
        *(Variant(width, width, padding=True) for width in (16, 48, 96, 112, 128, 192, 256)),
        Variant(64, 64, left=70, right=40, padding=True),
        Variant(64, 64, causal="bottom_right", left=30),
        Variant(64, 64, "bfloat16", causal="top_left", padding=True),
        Variant(64, 64, right=9),
        Variant(96, 96, tail=False),
        Variant(96, 96, causal="bottom_right", tail=False),
    )
]

pytestmark = pytest.mark.toolchain("ascend-kernels")


def name_of(value) -> str:
    return value.name if isinstance(value, Variant) else value.family if isinstance(value, Soc) else str(value)


@pytest.mark.parametrize(
    ("stage", "chip", "variant", "tile"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=name_of,
)
def test_against_float64(stage, chip, variant, tile, tmp_path):
    assert plan_kernel(variant, tile, chip, tmp_path) is not None
    assert run_kernel(tmp_path / LINALG, variant, tile, chip, stage) < LIMITS[variant.dtype]


def test_another_mask_is_noticed(tmp_path):
    """What is compared is what ran: the IR of a causal kernel is wrong for an attention that is not."""
    causal, tile = Variant(16, 16, causal="bottom_right"), Tile(16, 16)
    assert plan_kernel(causal, tile, A2, tmp_path) is not None
    full = Variant(16, 16)
    for stage in ("linalg", "hfusion"):
        assert run_kernel(tmp_path / LINALG, full, tile, A2, stage, [Problem(1, 2, 1, 20, 20)]) > 0.1
