"""`tilecut::grouped_matmul`: every row by the matrix of its expert, rows sorted by expert. torch only.

Rows `ends[e-1] : ends[e]` of x are multiplied by weight[e]. torch's own `_grouped_mm` wants aligned sizes on some devices
and dtypes, which pruned widths do not have; this op takes any.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tilecut_runtime.errors import InputError


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply sorted rows by their experts' matrices, `torch.ops.tilecut.grouped_matmul`.

    Args:
        x: [T, I], rows of one expert next to each other.
        weight: [E, I, O], x's dtype.
        ends: integers [E], not decreasing, the last one T: where the rows of each expert end.

    Returns:
        [T, O], x's dtype.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    return torch.ops.tilecut.grouped_matmul(x, weight, ends)


def _check(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    where = "tilecut.grouped_matmul"
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1]:
        raise InputError(
            where,
            "x and weight do not fit",
            got=f"{list(x.shape)} and {list(weight.shape)}",
            wanted="[T, I] and [E, I, O]",
        )
    if x.dtype != weight.dtype or not x.dtype.is_floating_point:
        raise InputError(where, "x and weight must have one floating dtype", got=f"{x.dtype} and {weight.dtype}")
    if ends.is_floating_point() or tuple(ends.shape) != (weight.shape[0],):
        raise InputError(
            where, "ends does not fit", got=f"{ends.dtype} {list(ends.shape)}", wanted=f"integers [{weight.shape[0]}]"
        )


def _groups(x: Tensor, ends: Tensor) -> list[slice]:
    """The rows of each expert."""
    bounds = [0, *ends.tolist()]
    if bounds != sorted(bounds) or bounds[-1] != x.shape[0]:
        raise InputError(
            "tilecut.grouped_matmul", "ends does not divide the rows", got=bounds[1:], wanted=f"rising to {x.shape[0]}"
        )
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]


@torch.library.custom_op("tilecut::grouped_matmul", mutates_args=())
def _grouped_matmul_op(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    _check(x, weight, ends)
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for rows, matrix in zip(_groups(x, ends), weight):
        out[rows] = x[rows] @ matrix
    return out


@_grouped_matmul_op.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("tilecut::grouped_matmul_backward", mutates_args=())
def _grouped_matmul_backward_op(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    d_x, d_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for e, rows in enumerate(_groups(x, ends)):
        d_x[rows] = grad[rows] @ weight[e].T
        d_weight[e] = x[rows].T @ grad[rows]
    return d_x, d_weight


@_grouped_matmul_backward_op.register_fake
def _(grad, x, weight, ends):
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return (*torch.ops.tilecut.grouped_matmul_backward(grad.contiguous(), *ctx.saved_tensors), None)


torch.library.register_autograd("tilecut::grouped_matmul", _backward, setup_context=_setup_context)
