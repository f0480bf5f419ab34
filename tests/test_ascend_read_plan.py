"""Bytes out of a memory plan, and the notes of a compiler that switched something off."""

import pytest

from tilecut_runtime.errors import LoweringError
from tilecut_targets.ascend.read_plan import Memory, read_plan, read_retries

HEADER = (
    'module attributes {dlti.target_system_spec = #hacc.target_device_spec<#dlti.dl_entry<"UB_SIZE", 1572864 : i32>, '
    '#dlti.dl_entry<"L1_SIZE", 4194304 : i32>, #dlti.dl_entry<"L0C_SIZE", 1048576 : i32>>} {\n'
)
CUBE = """  func.func @attention_forward_mix_aic(%arg0: i64) {
    %c0_i64 = arith.constant 0 : i64
    %c1000_i64 = arith.constant 1000 : i64
    %0 = hivm.hir.pointer_cast(%c0_i64) : memref<8x2x16x16xf16, #hivm.address_space<cbuf>>
    %1 = hivm.hir.pointer_cast(%c0_i64, %c1000_i64) : memref<16x16xf32, strided<[16, 1]>, #hivm.address_space<cc>>
"""
VECTOR = """  func.func @attention_forward_mix_aiv(%arg0: i64) {
    %c1000_i64 = arith.constant 96 : i64
    %2 = hivm.hir.pointer_cast(%c1000_i64) : memref<100xi1, #hivm.address_space<ub>>
    %3 = hivm.hir.pointer_cast(%arg0) [] : memref<?xi8, #hivm.address_space<gm>>
"""


def test_the_end_of_the_last_buffer_counts():
    assert read_plan(HEADER + CUBE + VECTOR) == {
        # 100 bits are 13 bytes; a function's constants are its own.
        "ub": Memory(96 + 13, 192 * 1024),
        "l1": Memory(8 * 2 * 16 * 16 * 2, 512 * 1024),
        # Double-buffered: the second one ends last.
        "l0c": Memory(1000 + 16 * 16 * 4, 128 * 1024),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + VECTOR.replace("(%c1000_i64)", "(%7)"), r"no constant place; got %2 = hivm\.hir\.pointer_cast\(%7\)"),
        (HEADER + VECTOR.replace("100xi1", "?xi1"), "no constant place"),
        (HEADER + VECTOR.replace("100xi1", "100xf6"), "no constant place"),
        (HEADER + VECTOR.replace("memref<100", "tensor<100"), "no constant place"),
        (VECTOR, "the plan's header has no UB_SIZE"),
    ],
)
def test_what_cannot_be_read_is_an_error(text, message):
    with pytest.raises(LoweringError, match=message):
        read_plan(text)


def test_retries():
    said = [
        "[NOTE] Ub overflow detected; automatically set enable-code-motion to false and retrying compilation.",
        "[NOTE] Ub overflow detected; automatically set enable-auto-multi-buffer to false and retrying compilation.",
        "loc(1): warning: [cv-pipelining] unsupported regioned op",
    ]
    assert read_retries(said) == ["enable-code-motion", "enable-auto-multi-buffer"]
    assert read_retries(said[2:]) == []
