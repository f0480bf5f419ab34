"""torch_npu's norm and rotary embedding without torch_npu: their schemas, their meaning, their shapes, what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from tilecut_runtime.errors import InputError
from tilecut_runtime.npu_norms import RMS_NORM, ROTARY_MUL, SCHEMAS
from tilecut_runtime.rotary import rotary_naive

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def test_the_schemas_are_the_ops():
    for op in (RMS_NORM, ROTARY_MUL):
        assert str(op._schema) == f"npu::{SCHEMAS[op._opname]}"


@DTYPES
@pytest.mark.parametrize("shape", [(8,), (5, 8)])
def test_the_norm_is_torchs(dtype, shape):
    x, gamma = torch.randn(2, 3, 5, 8).to(dtype), torch.randn(shape).to(dtype)
    y, rstd = RMS_NORM(x, gamma, 1e-3)
    torch.testing.assert_close(y, F.rms_norm(x, shape, gamma, 1e-3))
    dims = list(range(-len(shape), 0))
    torch.testing.assert_close(rstd, (x.float().square().mean(dims, keepdim=True) + 1e-3).rsqrt())
    torch.testing.assert_close(RMS_NORM(x, gamma)[0], F.rms_norm(x, shape, gamma, 1e-6))


@DTYPES
@pytest.mark.parametrize(("mode", "interleaved"), [("half", False), ("interleave", True)])
def test_the_rotary_embedding_is_tilecuts(dtype, mode, interleaved):
    x, cos, sin = torch.randn(2, 5, 3, 8).to(dtype), torch.randn(1, 5, 1, 8).to(dtype), torch.randn(1, 5, 1, 8).to(dtype)
    got = ROTARY_MUL(x, cos, sin, mode)
    want = rotary_naive(x.double(), cos.double(), sin.double(), interleaved=interleaved)
    torch.testing.assert_close(got, want.to(dtype))
    if not interleaved:
        assert torch.equal(ROTARY_MUL(x, cos, sin), got)


def test_shapes_without_numbers():
    x, gamma, table = (torch.empty(s, device="meta", dtype=torch.float16) for s in ((2, 5, 3, 8), (8,), (1, 5, 1, 8)))
    y, rstd = RMS_NORM(x, gamma)
    assert (y.shape, y.dtype, rstd.shape, rstd.dtype) == (x.shape, x.dtype, (2, 5, 3, 1), torch.float32)
    turned = ROTARY_MUL(x, table, table)
    assert (turned.shape, turned.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"rotary_mode": "quarter"}, "unknown rotary_mode; got quarter"), ({"rotate": torch.eye(8)}, "got rotate")],
)
def test_what_no_program_uses_is_refused(options, why):
    x, table = torch.ones(2, 5, 3, 8), torch.ones(1, 5, 1, 8)
    with pytest.raises(InputError, match=why):
        ROTARY_MUL(x, table, table, **options)
