"""Weights in few bits: never further off than the obvious rounding, exact on any x86, in the layout that the kernel reads."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from quantized_reference import unpacked
from tilecut_targets.edge import round_weights
from tilecut_targets.edge.round_weights import keep_pairs, round_blocks, round_columns


def weights(rows, columns, seed, heavy=False):
    """Random weights; heavy ones have columns of very different sizes and a few large numbers."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    if heavy:
        w *= np.exp(2 * rng.standard_normal(columns)).astype(np.float32)
        w[rng.random(w.shape) < 0.01] *= 20
    return w


def in_16_bits(x, w):
    """x uint8 [M, K] times w int8 [K, N] as x86 without VNNI does it: sums of two products saturate at 16 bits."""
    if len(w) % 2:
        x, w = np.pad(x, ((0, 0), (0, 1))), np.pad(w, ((0, 1), (0, 0)))
    products = x.astype(np.int64)[:, :, None] * w.astype(np.int64)[None]
    pairs = products.reshape(len(x), -1, 2, w.shape[1]).sum(2)
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(1)


shapes = st.tuples(st.integers(1, 80), st.integers(1, 9), st.integers(0, 10**6), st.booleans())


@settings(max_examples=60)
@given(shapes)
def test_columns_are_exact_in_16_bit_sums(shape):
    w = weights(*shape)
    rounded = round_columns(w)
    assert rounded.values.dtype == np.int8 and rounded.scale.dtype == np.float32 and (rounded.scale > 0).all()
    x = np.full((1, len(w)), 255, np.uint8)
    assert (in_16_bits(x, rounded.values) == x.astype(np.int64) @ rounded.values.astype(np.int64)).all()
    assert (np.abs(rounded.restored() - w) <= 2.1 * np.abs(w).max(0) / 127).mean() > 0.9


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_columns_are_closer_than_7_bits_everywhere(seed, heavy):
    w = weights(256, 40, seed, heavy)
    step = np.abs(w).max(0) / 64
    seven, ours = (np.square(y - w).sum(0) for y in (np.rint(w / step) * step, round_columns(w).restored()))
    assert (ours < seven).mean() > 0.9 and ours.sum() < 0.75 * seven.sum()


def test_the_16_bit_sums_do_saturate_without_the_care():
    w = np.full((4, 1), 127, np.int8)
    x = np.full((1, 4), 255, np.uint8)
    assert in_16_bits(x, w)[0, 0] == 2 * 32767 < 4 * 255 * 127
    assert in_16_bits(x, keep_pairs(w.astype(np.float32)).astype(np.int8))[0, 0] == 4 * 255 * 64


def test_an_outlier_is_clipped_where_that_is_closer_and_kept_where_not():
    many = np.tile(np.array([[1.0], [-1.0], [0.37], [-0.61]], np.float32), (10_000, 1))
    one = np.concatenate([many, [[1.4], [0]]]).astype(np.float32)
    assert round_columns(one).scale[0] < 1.4 / 127
    few = np.array([[1.0], [0.01], [0.02], [100.0]], np.float32)
    assert abs(round_columns(few).restored()[3, 0] - 100) < 1


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_zeros_stay_zeros(rows):
    w = np.zeros((rows, 3), np.float32)
    w[:, 1] = 0.5
    rounded, blocks = round_columns(w), round_blocks(w, 16)
    for restored in (rounded.restored(), blocks.restored()):
        assert (restored[:, [0, 2]] == 0).all() and np.isfinite(restored).all()
        assert np.allclose(restored[:, 1], 0.5, rtol=0.01)


def test_columns_are_the_same_in_chunks(monkeypatch):
    w = weights(30, 17, 3, True)
    whole, parts = round_columns(w), round_blocks(w, 16)
    monkeypatch.setattr(round_weights, "CHUNK", 100)
    assert (round_columns(w).values == whole.values).all() and (round_columns(w).scale == whole.scale).all()
    assert (round_blocks(w, 16).packed == parts.packed).all() and (round_blocks(w, 16).zero == parts.zero).all()


@settings(max_examples=40)
@given(shapes, st.sampled_from([16, 32, 128]))
def test_blocks_are_what_the_kernel_multiplies_by(shape, block):
    w = weights(*shape)
    rows, columns = w.shape
    rounded = round_blocks(w, block)
    restored = rounded.restored()
    assert np.allclose(restored, unpacked(rounded.packed, rounded.scale, rounded.zero, rows, columns, block), rtol=1e-6)
    x = np.eye(rows, dtype=np.float32)
    assert np.allclose(kernel(x, rounded, block, level=1), restored, rtol=1e-5, atol=1e-6 * np.abs(w).max())


def kernel(x, rounded, block, level):
    """MatMulNBits in onnxruntime."""
    rows, columns = rounded.rows, len(rounded.packed)
    sizes = {"K": rows, "N": columns, "bits": 4, "block_size": block, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "w", "s", "z"], ["y"], domain="com.microsoft", **sizes)
    held = {"w": rounded.packed, "s": rounded.scale.reshape(-1), "z": rounded.zero.reshape(-1)}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", columns])],
        [numpy_helper.from_array(v, k) for k, v in held.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@settings(max_examples=30)
@given(shapes)
def test_a_block_is_no_further_off_than_the_range_over_15(shape):
    w = weights(*shape)
    plain = np.zeros_like(w)
    for at in range(0, len(w), 16):
        part = w[at : at + 16]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        step = np.where(high > low, (high - low) / 15, 1)
        zero = np.rint(-low / step)
        plain[at : at + 16] = (np.clip(np.rint(part / step) + zero, 0, 15) - zero) * step
    ours = round_blocks(w, 16).restored()
    assert np.square(ours - w).sum() <= np.square(plain - w).sum() * 1.02 + 1e-9
