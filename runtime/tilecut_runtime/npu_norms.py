"""torch_npu's RMS norm and rotary embedding, `torch.ops.npu.npu_rms_norm` and `npu_rotary_mul`, wherever torch is.

As `npu_attention.py` does for attention: without torch_npu this module defines the ops under the same names and schemas, and
on the CPU they compute what they mean, 16 bits in float32:

    npu_rms_norm     x / sqrt(mean(x^2) + epsilon) * gamma over gamma's dimensions, and 1 / sqrt(..) in float32
    npu_rotary_mul   r1 * x + r2 * rotate(x): cat(-x2, x1) of x's halves ("half"), or of neighbours ("interleave")

A mode or input that no program of tilecut uses is refused, not guessed.

Source: torch_npu 2.13.0 (schemas and their documentation); CANN operator library, aclnnRmsNorm.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from tilecut_runtime.errors import InputError
from tilecut_runtime.rotary import rotary_naive

SCHEMAS = {
    "npu_rms_norm": "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)",
    "npu_rotary_mul": 'npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor',
}
MODES = ("half", "interleave")


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """What npu_rms_norm and CANN's RmsNorm mean."""
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(list(range(-gamma.ndim, 0)), keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, mode: str = "half") -> Tensor:
    """What npu_rotary_mul and CANN's RotaryMul and RotaryPositionEmbedding mean."""
    if mode not in MODES:
        raise InputError("npu_rotary_mul", "unknown rotary_mode", got=mode, wanted=" or ".join(MODES))
    return rotary_naive(x.float(), cos.float(), sin.float(), interleaved=mode == "interleave").to(x.dtype)


def _rms_norm_cpu(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return rms_norm(input, gamma, epsilon)


def _rotary_mul_cpu(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    if rotate is not None:
        raise InputError("npu_rotary_mul", "an argument that the op's meaning here does not know", got="rotate")
    return rotary_mul(input, r1, r2, rotary_mode)


def _rms_norm_shapes(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    kept = input.shape[: input.ndim - gamma.ndim]
    return input.new_empty(input.shape), input.new_empty((*kept, *[1] * gamma.ndim), dtype=torch.float32)


def _rotary_mul_shapes(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None):
    return input.new_empty(input.shape)


if "torch_npu" not in sys.modules:
    _LIBRARY = torch.library.Library("npu", "FRAGMENT")
    for _name, _meaning, _shapes in (
        ("npu_rms_norm", _rms_norm_cpu, _rms_norm_shapes),
        ("npu_rotary_mul", _rotary_mul_cpu, _rotary_mul_shapes),
    ):
        _LIBRARY.define(SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(_name, _meaning, "CPU")
        torch.library.register_fake(f"npu::{_name}", _shapes, lib=_LIBRARY)
RMS_NORM = torch.ops.npu.npu_rms_norm.default
ROTARY_MUL = torch.ops.npu.npu_rotary_mul.default
