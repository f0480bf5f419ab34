"""Cubins of the attention kernels for GPUs that are not here: they build, fit, do not spill and pad nothing."""

import re

import pytest

from tilecut_runtime.errors import ConfigError, LoweringError
from tilecut_runtime.kernels.choose_tile import DIRECTIONS, Tile, choose_tile, read_tiles
from tilecut_targets.cuda.chips import ARCHS, SHARED_LIMIT
from tilecut_targets.cuda.compile_kernels import AMD_ARCHS, Variant, compile_kernel, matrix_work

PACKED = ("CuQ", "CuK", "Tiles")
WIDTHS = sorted(int(w) for w in read_tiles()["tiles"]["sm_90"]["forward"]["16"])


def build(direction: str, arch: str, variant: Variant):
    bits = 32 if variant.dtype == "fp32" else 16
    return compile_kernel(direction, arch, variant, choose_tile(arch, direction, variant.width, bits))


def check(binary) -> None:
    """What is promised of every shipped tile."""
    assert len(binary.code) > 1000 and binary.registers > 0
    assert binary.shared <= SHARED_LIMIT[binary.arch]
    if binary.kernel in ("forward", "decode") or (binary.kernel in ("dq", "dkdv") and binary.variant.width <= 64):
        assert binary.spills == 0, binary
    if binary.variant.dtype == "fp32" or binary.kernel in ("delta", "combine"):
        return
    # Backward tiles of wide heads are too small for Hopper's instructions, or for their warps: docs/cuda_kernels.md.
    if binary.kernel in ("dq", "dkdv") and binary.variant.width > 64:
        return
    if binary.arch == "sm_90" and binary.kernel != "decode":
        assert binary.instructions["HGMMA"] > 0
    if binary.arch == "sm_100" and binary.kernel == "forward" and binary.tile.block_m >= 64:
        assert binary.instructions["UTCHMMA"] > 0
    if binary.arch in ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90") and binary.kernel != "decode":
        # The loop's body stands in the code twice, with a mask and without, or once more where the compiler peels it; a
        # width that is padded is no whole multiple.
        exact = matrix_work(binary.kernel, binary.variant, binary.tile)
        assert binary.matrix_work in (2 * exact, 3 * exact)


@pytest.mark.parametrize(
    ("direction", "arch", "width"),
    [
        ("forward", "sm_80", 80),
        ("forward", "sm_90", 64),
        ("forward", "sm_90", 48),
        ("forward", "sm_100", 64),
        ("forward", "sm_87", 96),
        ("decode", "sm_87", 64),
        ("dq", "sm_80", 64),
        ("dkdv", "sm_90", 64),
    ],
)
def test_shipped_tiles(direction, arch, width):
    check(build(direction, arch, Variant(width, inputs=("CuQ", "CuK") if direction == "decode" else PACKED)))


@pytest.mark.parametrize("kernel", ["delta", "combine"])
def test_small_kernels(kernel):
    binary = compile_kernel(kernel, "sm_80", Variant(200), Tile(64, 64, 4, 1))
    assert binary.spills == 0 and binary.shared <= SHARED_LIMIT["sm_80"]


@pytest.mark.parametrize("width", [40, 48, 80, 88])
def test_a_width_costs_what_it_is_rounded_to_16(width):
    """88 costs 96, and not the 128 of a power of two."""
    rounded = -(-width // 16) * 16
    work = compile_kernel("forward", "sm_80", Variant(width), Tile(64, 32, 4, 2)).matrix_work
    assert work == 2 * 64 * 32 * (rounded + rounded)


def test_line_info_is_left_out():
    assert b".debug_line" not in build("decode", "sm_80", Variant(64)).code


def test_too_large_a_tile_is_refused():
    with pytest.raises(LoweringError, match="forward of width 256 does not fit sm_86") as caught:
        compile_kernel("forward", "sm_86", Variant(256), Tile(128, 64, 8, 2))
    assert re.search(r"\d+ bytes of shared memory", str(caught.value.got))


def test_a_tile_that_compiles_to_nothing_is_refused():
    with pytest.raises(LoweringError, match="without products"):
        compile_kernel("dkdv", "sm_100", Variant(192, inputs=PACKED), Tile(64, 128, 8, 2))


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ConfigError, match="unknown architecture"):
        compile_kernel("forward", "sm_70", Variant(64), Tile(64, 64, 4, 2))


FEATURES = {
    "everything packed": Variant(
        88,
        40,
        dropout=0.1,
        window=(100, 3),
        global_tokens=5,
        softcap=30.0,
        group=2,
        inputs=(*PACKED, "BlockOffsets", "BlockIndices", "BlockBase", "Seed", "Slopes"),
    ),
    "everything dense": Variant(
        88, 40, causal=False, window=(100, -1), inputs=("KeyPadding", "Bias", "Slopes", "DBias")
    ),
    "top left": Variant(64, top_left=True, window=(3, 4), global_tokens=2),
    "tf32": Variant(64, dtype="fp32", precision="tf32"),
    "fp16": Variant(64, dtype="fp16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kernel", ["forward", "decode", "dq", "dkdv"])
def test_features_compile(kernel, features):
    tile = Tile(16, 32, 4, 1) if kernel == "decode" else Tile(64, 32, 4, 1)
    assert compile_kernel(kernel, "sm_80", FEATURES[features], tile).code


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arch", ARCHS)
def test_whole_table(arch, direction, width):
    packed = ("CuQ", "CuK") if direction == "decode" else PACKED
    for inputs in (packed, ()):
        check(build(direction, arch, Variant(width, inputs=inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_whole_table_of_float32(arch, direction, width):
    packed = ("CuQ", "CuK") if direction == "decode" else PACKED
    check(build(direction, arch, Variant(width, dtype="fp32", inputs=packed)))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "decode", "dq", "dkdv"])
@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_amd_code_objects(arch, kernel):
    """They build; no tiles are shipped for AMD."""
    tile = Tile(16, 64, 4, 1) if kernel == "decode" else Tile(64, 64, 4, 1)
    binary = compile_kernel(kernel, arch, Variant(64), tile)
    assert binary.code.startswith(b"\x7fELF")
    assert binary.instructions["MFMA"] > 0
