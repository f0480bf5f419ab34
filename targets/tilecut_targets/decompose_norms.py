"""`aten.rms_norm` and `tilecut::rotary` in plain ops, for targets and chips that have no op for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilecut_runtime.rotary import rotary_naive

decomposed_rotary = rotary_naive


def decomposed_rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None):
    """aten.rms_norm as it computes: 16 bits in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = list(range(-len(normalized_shape), 0))
    eps = default_eps(x.dtype) if eps is None else eps
    out = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
    return (out if weight is None else out * weight).to(x.dtype)


def default_eps(dtype: torch.dtype) -> float:
    """What torch takes where a norm names none: the epsilon of the type that it computes in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps
