"""Norms and rotary embeddings in the legality table: an op, or the limit that is broken and what is near."""

import dataclasses

import pytest

from tilecut_targets.ascend.legal_norms import FusedRotary, RotaryShape, choose_norm, choose_rotary
from tilecut_targets.ascend.legality import Refused, family_row, fuses, read_table

FAMILIES = tuple(read_table()["family"])
ROTARY = RotaryShape("float32", width=64, heads=32, batch=None, interleaved=False, shared=True)


@pytest.mark.parametrize("container", ["onnx", "air"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_container_without_custom_ops_has_no_norm_and_no_rotary_either(family, container):
    row = family_row(family)
    for kind in ("norm", "rotary"):
        assert set(row[kind]) == {"onnx", "air"}
        assert not row[kind][container] or fuses(family, container)
    norm = choose_norm(family, container, "float32", 64, 1e-6)
    assert norm == row["norm"][container] or (isinstance(norm, Refused) and not row["norm"][container])
    rotary = choose_rotary(family, container, ROTARY)
    assert isinstance(rotary, FusedRotary) == bool(row["rotary"][container])


@pytest.mark.parametrize("eps", [1e-6, 1.0000000000000002e-06, 9.999999974752427e-07])
def test_in_onnx_epsilon_is_what_the_reader_sets_as_a_float32(eps):
    assert choose_norm("a2", "onnx", "float32", 64, eps) == "RmsNorm"


@pytest.mark.parametrize("eps", [1e-5, 1.1e-6, 0.0, 1.1920928955078125e-07])
def test_in_onnx_another_epsilon_is_refused_and_in_air_it_is_not(eps):
    refused = choose_norm("a2", "onnx", "float32", 64, eps)
    assert isinstance(refused, Refused) and "sets epsilon 1e-06, whatever the node says" in str(refused)
    assert f"got {eps:g}" in str(refused) and "RmsNorm of the .air file takes any" in str(refused)
    assert choose_norm("a2", "air", "float32", 64, eps) == "RmsNorm"


@pytest.mark.parametrize(
    ("family", "dtype", "width", "why"),
    [
        ("p310", "bfloat16", 64, "takes float16 or float32; got bfloat16"),
        ("p310", "float32", 7, "at least 32 bytes; got 28"),
        ("p310", "float16", 15, "at least 32 bytes; got 30"),
        ("a2", "float64", 64, "got float64"),
    ],
)
def test_limits_of_norms(family, dtype, width, why):
    assert why in str(choose_norm(family, "onnx", dtype, width, 1e-6))


def test_the_nearest_sizes_within_the_limits_are_taken():
    assert choose_norm("p310", "onnx", "float32", 8, 1e-6) == choose_norm("p310", "onnx", "float16", 16, 1e-6) == "RmsNorm"
    assert choose_norm("a2", "onnx", "float32", 1, 1e-6) == "RmsNorm"


HALF, PAIRS = "half", "interleave"


@pytest.mark.parametrize(
    ("family", "container", "changes", "found"),
    [
        ("a2", "onnx", {}, FusedRotary("RotaryPositionEmbedding", HALF, False)),
        ("a2", "onnx", {"width": 894, "batch": 999, "heads": 999}, FusedRotary("RotaryPositionEmbedding", HALF, False)),
        ("a2", "onnx", {"shared": False}, FusedRotary("RotaryPositionEmbedding", HALF, False)),
        ("a2", "onnx", {"interleaved": True, "batch": 31}, FusedRotary("RotaryPositionEmbedding", PAIRS, False)),
        # One element of a table serves up to 1023 of x; an open batch may be larger.
        ("a2", "air", {}, FusedRotary("RotaryMul", HALF, True)),
        ("a3", "air", {"batch": 31}, FusedRotary("RotaryMul", HALF, False)),
        ("a3", "air", {"batch": 32}, FusedRotary("RotaryMul", HALF, True)),
        ("a3", "air", {"shared": False}, FusedRotary("RotaryMul", HALF, False)),
        ("a950", "air", {"interleaved": True}, FusedRotary("RotaryPositionEmbedding", PAIRS, False)),
        ("a950", "air", {"width": 1024, "heads": 4000}, FusedRotary("RotaryPositionEmbedding", HALF, False)),
    ],
)
def test_the_op_for_a_rotary_embedding(family, container, changes, found):
    assert choose_rotary(family, container, dataclasses.replace(ROTARY, **changes)) == found


@pytest.mark.parametrize(
    ("family", "container", "changes", "why"),
    [
        ("p310", "onnx", {}, "have no fused rotary embedding in an .onnx file"),
        ("a3", "onnx", {}, "RotaryMul of the .air file has it"),
        ("a2", "onnx", {"dtype": "float64"}, "got float64"),
        ("a2", "onnx", {"width": 896}, "multiples of 2 up to 894; got 896; the nearest is 894"),
        ("a2", "onnx", {"batch": 1000}, "up to 999 rows; got 1000"),
        ("a2", "onnx", {"heads": 1000}, "up to 999 heads; got 1000"),
        ("a2", "onnx", {"interleaved": True}, "got a batch that is known at run time; compile at a fixed batch"),
        ("a2", "onnx", {"interleaved": True, "batch": 32}, "got 32 times 32"),
        ("a2", "onnx", {"interleaved": True, "batch": 1, "shared": False}, "got a table for every row"),
        ("a2", "air", {"interleaved": True, "batch": 1}, "takes the modes half; got interleave"),
        ("a2", "air", {"width": 80}, "multiples of 64 up to 832; got 80; the nearest is 128"),
        ("a950", "air", {"width": 1026}, "up to 1024; got 1026; the nearest is 1024"),
    ],
)
def test_limits_of_rotary_embeddings(family, container, changes, why):
    assert why in str(choose_rotary(family, container, dataclasses.replace(ROTARY, **changes)))
