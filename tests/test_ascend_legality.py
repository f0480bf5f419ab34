"""Chips by name, and the legality table: its rows, and an answer or a reason for every attention."""

import itertools

import pytest

from tilecut_runtime.errors import ConfigError, LoweringError
from tilecut_targets.ascend.chips import CHIPS, DEFAULT_SOC, LINES, find_chip, read_wish
from tilecut_targets.ascend.legality import (
    ALL_TOKENS,
    AttentionShape,
    Fused,
    Refused,
    choose,
    family_row,
    fuses,
    op_row,
    read_table,
    template_width,
)

FAMILIES = ("a2", "a3", "a950", "p310", "b310", "a910")


def test_every_chip_of_every_family_has_its_numbers():
    assert {chip.family for chip in CHIPS.values()} == set(FAMILIES) == set(read_table()["family"])
    for soc, chip in CHIPS.items():
        assert soc == chip.soc and soc.startswith("Ascend")
        assert min(chip.cores, chip.gigahertz, chip.gigabytes, chip.ub, chip.l1, chip.l0a, chip.l0b, chip.l0c) > 0
        assert find_chip(soc.lower()) is find_chip(soc.upper()) is find_chip(soc.removeprefix("Ascend")) is chip
    assert set(LINES.values()) <= set(CHIPS)
    assert (DEFAULT_SOC, read_wish(None).chip.soc) == ("Ascend910B3", "Ascend910B3")
    # 20 cores of 8192 multiplications and additions in a cycle, 1.8 GHz.
    assert CHIPS["Ascend910B3"].tflops == pytest.approx(294.912)


@pytest.mark.parametrize(
    ("words", "soc", "dtype"),
    [
        ("Ascend310P3", "Ascend310P3", "float32"),
        ("ascend910b4,FP16", "Ascend910B4", "float16"),
        ("fp16", "Ascend910B3", "float16"),
        ("910_9391", "Ascend910_9391", "float32"),
        ("Ascend910_9362, float32", "Ascend910_9362", "float32"),
        ("Ascend950", "Ascend950PR_9589", "float32"),
        ("Ascend950PR_957C", "Ascend950PR_957c", "float32"),
        ("bf16,a2", "Ascend910B3", "bfloat16"),
    ],
)
def test_the_words_of_a_target(words, soc, dtype):
    wish = read_wish(words)
    assert (wish.chip.soc, wish.dtype) == (soc, dtype)


@pytest.mark.parametrize(
    ("words", "near"), [("Ascend910B5", "Ascend910B"), ("310P4", "Ascend310P"), ("Ascend910_9399", "Ascend910_93")]
)
def test_an_unknown_chip_is_one_error_with_the_known_and_the_nearest(words, near):
    with pytest.raises(ConfigError, match=f"unknown Ascend chip; got '{words}'; wanted .*; the nearest is {near}") as e:
        read_wish(words)
    assert all(soc in str(e.value) for soc in CHIPS)


@pytest.mark.parametrize("words", ["fp16,bf16", "Ascend910B1,Ascend910B2", "310P3,fp16,910B3"])
def test_one_chip_and_one_type(words):
    with pytest.raises(ConfigError, match="more than one chip or type"):
        read_wish(words)


def test_every_row_names_documents_that_are_listed():
    table = read_table()
    rows = [*table["family"].values(), *(row for op in table["op"].values() for row in op.values())]
    assert all(row["source"] and set(row["source"]) <= set(table["documents"]) for row in rows)
    for family, container in itertools.product(FAMILIES, ("onnx", "air")):
        for op in filter(None, family_row(family)[container].values()):
            assert op_row(op, family)["head_width"] == 512


def shape(**given):
    return AttentionShape(**({"dtype": "float16", "width": 64, "value_width": 64, "heads": 8, "kv_heads": 8} | given))


@pytest.mark.parametrize(
    ("family", "container", "prefill", "decode"),
    [
        ("a2", "onnx", "PromptFlashAttention", "PromptFlashAttention"),
        ("a2", "air", "FusedInferAttentionScore", "FusedInferAttentionScore"),
        ("a3", "onnx", None, None),
        ("a3", "air", "FusedInferAttentionScore", "FusedInferAttentionScore"),
        ("a950", "onnx", None, None),
        ("a950", "air", "FusedInferAttentionScore", "FusedInferAttentionScore"),
        ("p310", "onnx", "PromptFlashAttention", None),
        ("p310", "air", None, None),
        ("b310", "onnx", None, None),
        ("a910", "onnx", None, None),
    ],
)
def test_which_op_on_which_chip(family, container, prefill, decode):
    for step, want in (({}, prefill), ({"queries": 1, "keys": None, "equal_lengths": False}, decode)):
        found = choose(family, shape(**step), container)
        assert (found.op if isinstance(found, Fused) else None) == want
        if want is None:
            assert isinstance(found, Refused) and family_row(family)["products"] in str(found)
    assert fuses(family, container) == (prefill is not None or decode is not None)


FLAT = {"heads": 256, "kv_heads": 256, "width": 256, "value_width": 256}


@pytest.mark.parametrize(
    ("family", "given", "limit", "got", "near"),
    [
        ("a2", {"width": 20, "value_width": 20}, "multiples of 16 up to 512", "20", "32"),
        ("a2", {"width": 1024, "value_width": 1024}, "up to 512", "1024", "512"),
        ("a2", {"heads": 100, "kv_heads": 1}, "up to 64 heads for one KV head", "100 heads on 1", "2 KV heads"),
        ("a2", {"heads": 300, "kv_heads": 300}, "up to 256 heads", "300", "256"),
        ("a2", {"dtype": "float32"}, "takes float16 or bfloat16", "float32", "float16"),
        ("p310", {"dtype": "bfloat16"}, "PromptFlashAttention takes float16", "bfloat16", "float16"),
        ("p310", {"queries": 65664, "keys": 65664}, "up to 65535 positions", "65664", "65535"),
        ("p310", {"padding": True, "queries": 100, "keys": 100}, "multiples of 128", "100 and 100", "128"),
        ("p310", {"padding": True}, "multiples of 128", "run time", "dynamic_shapes={}"),
        ("a2", {"packed": True}, "takes the layouts", "TND", "BNSD with a mask"),
        ("a2", {**FLAT, "layout": "BSH"}, "up to 65534 in BSH", "65536", "BNSD"),
        ("a2", {"softcap": True}, "adds nothing", "soft-cap", "MatMul"),
        ("a2", {"slopes": True}, "adds nothing", "ALiBi", "MatMul"),
        ("a2", {"bias": True}, "adds nothing", "additive bias", "MatMul"),
        ("a2", {"dropout": True}, "drops no weights", "dropout", "eval"),
    ],
)  # fmt: skip
def test_a_limit_that_is_broken_is_named_with_the_nearest_legal_choice(family, given, limit, got, near):
    found = choose(family, shape(**given))
    assert isinstance(found, Refused)
    assert limit in found.limit and got in found.got and near in found.nearest
    with pytest.raises(LoweringError, match="no fused attention"):
        raise found.error("a node")


def test_packed_sequences_are_for_head_widths_of_128_and_192():
    found = choose("a2", shape(packed=True), "air")
    assert isinstance(found, Refused)
    assert "TND with head widths 128 and 192" in found.limit and (found.got, "128" in found.nearest) == ("64", True)
    with pytest.raises(LoweringError, match=r"no fused attention; got 64; wanted .*TND.*; the nearest is 128"):
        raise found.error("attention_0")
    for width in (128, 192):
        fused = choose("a2", shape(packed=True, width=width, value_width=width), "air")
        assert isinstance(fused, Fused) and fused.layout == "TND"


def test_padding_that_lengths_tell_needs_no_mask():
    padded = {"padding": True, "lengths": True}
    for given, want in (
        ({}, ("none", 0)),
        # Mode 3 counts from the last key of each row, which padding moves; 2 from the first.
        ({"causal": "bottom_right"}, ("compressed", 2)),
        ({"causal": "top_left"}, ("compressed", 2)),
        ({"causal": "bottom_right", "equal_lengths": False}, ("full", 0)),
        ({"window": (3, 3)}, ("full", 0)),
        ({"hidden": True}, ("full", 0)),
        ({"global_tokens": 1}, ("full", 0)),
    ):
        found = choose("a2", shape(**padded, **given))
        assert isinstance(found, Fused)
        assert (found.mask, found.sparse_mode) == want and found.lengths == (want[0] != "full"), given
    # 310P and the op of the .air file take no lengths.
    air = choose("a2", shape(**padded), "air")
    assert isinstance(air, Fused) and (air.mask, air.lengths) == ("full", False)
    assert isinstance(choose("p310", shape(**padded)), Refused)


def test_310p_has_as_many_kv_heads_as_heads():
    assert choose("p310", shape(heads=8, kv_heads=2)) == Fused(
        "PromptFlashAttention", "BNSD", 0, ALL_TOKENS, ALL_TOKENS, "none", 0, True, 0
    )
    grouped = choose("a2", shape(heads=8, kv_heads=2))
    assert isinstance(grouped, Fused) and (grouped.kv_heads, grouped.expand) == (2, False)


def test_a_window_of_a_step_that_may_have_one_query_is_a_full_mask():
    given = {"causal": "bottom_right", "window": (3, -1)}
    one, other = choose("a2", shape(**given)), choose("a2", shape(**given, equal_lengths=False))
    assert isinstance(one, Fused) and (one.mask, one.sparse_mode, one.pre_tokens, one.next_tokens) == ("compressed", 4, 3, 0)
    assert isinstance(other, Fused) and (other.mask, other.sparse_mode, other.pre_tokens) == ("full", 0, ALL_TOKENS)


@pytest.mark.parametrize(
    ("family", "width", "want"),
    [("a2", 48, 64), ("a2", 72, 80), ("a3", 96, 96), ("p310", 112, 128), ("a2", 129, 144), ("b310", 40, 48)],
)
def test_a_width_costs_what_the_next_template_does(family, width, want):
    assert template_width(family, width) == want
