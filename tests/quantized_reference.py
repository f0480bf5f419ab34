"""The arithmetic of a quantized ONNX file in numpy: onnx's reference evaluator with onnxruntime's own ops, written out."""

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from scipy.special import erf

HIDDEN = np.finfo(np.float32).min / 2


def attend(q, k, v, mask, heads, scale, causal):
    """[B, S, H*D] -> [B, S, H*D], mask int [B, S]: 1 keeps."""
    b, s, width = q.shape
    q, k, v = (x.reshape(b, s, heads, width // heads).transpose(0, 2, 1, 3).astype(np.float64) for x in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * scale
    if mask is not None:
        scores = np.where(mask[:, None, None, :] != 0, scores, HIDDEN)
    if causal:
        scores = np.where(np.tri(s, dtype=bool), scores, HIDDEN)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    out = e / e.sum(-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(b, s, width).astype(np.float32)


def multiply(x, weight, x_scale, w_scale, x_zero, bias):
    """Integers times integers, exactly, then scaled."""
    exact = (x.astype(np.int64) - int(x_zero)) @ weight.astype(np.int64)
    out = exact * (np.float64(x_scale) * w_scale)
    return (out if bias is None else out + bias).astype(np.float32)


class MatMulIntegerToFloat(OpRun):
    op_domain = "com.microsoft"

    def _run(self, a, b, a_scale, b_scale, a_zero=None, b_zero=None, bias=None):
        assert b_zero is None or not b_zero.any()
        return (multiply(a, b, a_scale, b_scale, a_zero, bias),)


class QAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, weight, bias, x_scale, w_scale, mask, x_zero, num_heads=None, scale=None, unidirectional=None):
        q, k, v = np.split(multiply(x, weight, x_scale, w_scale, x_zero, bias), 3, -1)
        return (attend(q, k, v, mask, num_heads, scale, unidirectional),)


class MultiHeadAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(self, q, k, v, bias=None, mask=None, num_heads=None, scale=None, unidirectional=None):
        assert bias is None
        return (attend(q, k, v, mask, num_heads, scale, unidirectional),)


class BiasGelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, bias):
        y = (x + bias).astype(np.float64)
        return ((y * 0.5 * (1 + erf(y / 2**0.5))).astype(np.float32),)


class MatMulNBits(OpRun):
    """Level 4: x is rounded to int8 a block of a row, by its largest magnitude."""

    op_domain = "com.microsoft"

    def _run(self, x, packed, scale, zero, K=None, N=None, bits=None, block_size=None, accuracy_level=None):
        assert bits == 4
        weight = unpacked(packed, scale, zero, K, N, block_size)
        if accuracy_level == 4:
            blocks = packed.shape[1]
            padded = np.zeros((*x.shape[:-1], blocks * block_size), np.float32)
            padded[..., :K] = x
            parts = padded.reshape(*x.shape[:-1], blocks, block_size)
            step = np.abs(parts).max(-1, keepdims=True) / 127
            parts = np.rint(parts / np.where(step > 0, step, 1)) * step
            x = parts.reshape(padded.shape)[..., :K]
        return ((x.astype(np.float64) @ weight).astype(np.float32),)


def unpacked(packed, scale, zero, rows, columns, block):
    """The weights [K, N] that MatMulNBits multiplies by, from its inputs."""
    blocks = packed.shape[1]
    nibbles = lambda a: np.stack([a & 15, a >> 4], -1).reshape(*a.shape[:-1], -1).astype(np.float64)
    zeros = nibbles(zero.reshape(columns, -1))[:, :blocks, None]
    values = (nibbles(packed) - zeros) * scale.reshape(columns, blocks, 1)
    return values.reshape(columns, blocks * block)[:, :rows].T


def run_reference(path, inputs):
    """Outputs by name of a quantized file, in numpy."""
    ops = [MatMulIntegerToFloat, QAttention, MultiHeadAttention, BiasGelu, MatMulNBits]
    model = onnx.load(str(path))
    got = ReferenceEvaluator(model, new_ops=ops).run(None, {i.name: inputs[i.name] for i in model.graph.input})  # type: ignore[arg-type]
    return {o.name: x for o, x in zip(model.graph.output, got)}
