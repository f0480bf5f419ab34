"""onnxruntime's ops one by one: shapes under torch, and what onnxruntime computes for them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checks import run_onnx
from tilecut_passes.run_passes import largest_error
from tilecut_runtime.attention import attention
from tilecut_targets.edge import ort_ops

HEADS = 3


class Ops(nn.Module):
    """Every op, on inputs: x [2, 5, 8], weight [8, 36], bias [36], mask [2, 5], q, k, v [2, 5, 12], added [1, 3, 5, 5]."""

    def forward(self, x, weight, bias, mask, q, k, v, added):
        return (
            ort_ops.attention(x, weight, bias, None, HEADS, 0.4, False),
            ort_ops.attention(x, weight, bias, mask, HEADS, 0.5, True),
            ort_ops.multi_head_attention(q, k, v, None, None, HEADS, 0.4, False),
            ort_ops.multi_head_attention(q, k, v, mask, None, HEADS, 0.5, True),
            ort_ops.multi_head_attention(q, k, v[..., :6], None, added, HEADS, 0.6, False),
            ort_ops.residual_sum(q, k),
            ort_ops.bias_gelu(q, bias[:12]),
        )


@pytest.fixture(scope="module")
def inputs():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.int32)
    return {
        "x": torch.randn(2, 5, 8), "weight": torch.randn(8, 36), "bias": torch.randn(36), "mask": mask,
        "q": torch.randn(2, 5, 12), "k": torch.randn(2, 5, 12), "v": torch.randn(2, 5, 12), "added": torch.randn(1, 3, 5, 5),
    }  # fmt: skip


def reference(x, weight, bias, mask, q, k, v, added):
    apart = lambda t: t.unflatten(2, (HEADS, -1)).transpose(1, 2)
    folded = lambda t: t.transpose(1, 2).flatten(2)
    keep = mask.bool()
    packed = [apart(t) for t in (x @ weight + bias).chunk(3, -1)]
    q4, k4, v4 = apart(q), apart(k), apart(v)
    return (
        folded(attention(*packed, scale=0.4)),
        folded(attention(*packed, keep, scale=0.5, causal="top_left")),
        folded(attention(q4, k4, v4, scale=0.4)),
        folded(attention(q4, k4, v4, keep, scale=0.5, causal="top_left")),
        folded(attention(q4, k4, apart(v[..., :6]), None, added, scale=0.6)),
        q + k,
        F.gelu(q + bias[:12]),
    )


def test_under_torch_every_op_has_the_references_shapes_and_dtypes(inputs):
    made, want = Ops()(**inputs), reference(**inputs)
    assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in want]


def test_in_onnxruntime_every_op_has_the_references_numbers(inputs, tmp_path):
    program = torch.export.export(Ops(), (), inputs)
    names = [f"op_{i}" for i in range(7)]
    torch.onnx.export(
        program, (), str(tmp_path / "m.onnx"), opset_version=ort_ops.ONNX_OPSET, output_names=names, verbose=False
    )  # fmt: skip
    want = dict(zip(names, reference(**inputs), strict=True))
    got = run_onnx(tmp_path / "m.onnx", inputs)
    for name in names:
        assert largest_error({name: want[name]}, got) < 1e-5, name
