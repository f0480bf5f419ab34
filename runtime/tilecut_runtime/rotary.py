"""`tilecut::rotary`: rotary position embedding as one op. torch only; imported only where torch is wanted.

    out = x * cos + rotate(x) * sin

rotate turns pairs of x's last dimension D by 90 degrees: the pairs (i, i + D / 2), as cat(-x2, x1) of its halves, or
where `interleaved` the pairs (2 i, 2 i + 1), as x[1::2] negated and x[::2] taken by turns. cos and sin are as wide as x, as
models have them, and broadcast to it: [B|1, 1, S, D] to [B, H, S, D], [B|1, S, 1, D] to [B, S, H, D]. They need not be the
cosine and sine of anything.

Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv 2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilecut_runtime.errors import InputError

WHERE = "tilecut.rotary"


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding as one op, `torch.ops.tilecut.rotary`.

    Args:
        x: [B, H, S, D] or [B, S, H, D], D even.
        cos, sin: broadcastable to x, of four dimensions, as wide as x, x's dtype.
        interleaved: whether neighbours are pairs, or the halves' elements.

    Returns:
        x's shape and dtype.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    check(x, cos, sin)
    return torch.ops.tilecut.rotary(x, cos, sin, interleaved=interleaved)


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse operands that the op does not take."""
    if x.ndim != 4 or x.shape[-1] % 2:
        raise InputError(WHERE, "x does not fit", got=list(x.shape), wanted="[B, H, S, D], D even")
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.ndim == 4 and all(n in (1, m) for n, m in zip(table.shape, x.shape))
        if not fits or table.shape[-1] != x.shape[-1]:
            wanted = f"broadcastable to {list(x.shape)}, {x.shape[-1]} wide"
            raise InputError(WHERE, f"{name} does not fit", got=list(table.shape), wanted=wanted)
        if table.dtype != x.dtype or not x.dtype.is_floating_point:
            got = f"x {x.dtype}, {name} {table.dtype}"
            raise InputError(WHERE, "x, cos and sin must have one floating dtype", got=got)


def rotated(x: Tensor, interleaved: bool) -> Tensor:
    """x with its pairs turned by 90 degrees."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotary_naive(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """What `tilecut::rotary` means, in plain torch."""
    return x * cos + rotated(x, interleaved) * sin


@torch.library.custom_op("tilecut::rotary", mutates_args=())
def _rotary_op(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    check(x, cos, sin)
    return rotary_naive(x, cos, sin, interleaved=interleaved)


@_rotary_op.register_fake
def _(x, cos, sin, *, interleaved):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.interleaved = keyword_only_inputs["interleaved"]


def _backward(ctx, grad):
    x, cos, sin = ctx.saved_tensors
    # Turning back is turning by -90 degrees.
    d_x = grad * cos - rotated(grad * sin, ctx.interleaved)
    d_cos = (grad * x).sum_to_size(cos.shape) if ctx.needs_input_grad[1] else None
    d_sin = (grad * rotated(x, ctx.interleaved)).sum_to_size(sin.shape) if ctx.needs_input_grad[2] else None
    return d_x, d_cos, d_sin


torch.library.register_autograd("tilecut::rotary", _backward, setup_context=_setup_context)
