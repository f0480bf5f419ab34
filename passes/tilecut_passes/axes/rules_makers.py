"""Rules for calls that make a tensor from nothing, or one in the likeness of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.infer import Axes, NodeTypes, Types, for_each_result, fresh
from tilecut_passes.graph import value_of

aten = torch.ops.aten


def maker(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """A tensor from nothing: fresh axes, cut by selecting from it; dynamic sizes are frozen."""
    axes.makers.append(node)
    out = fresh(value_of(node))
    for axis in out:
        if not axis.is_static:
            axis.freeze("dynamic size")
    return out


def like(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """The first argument's shape and meaning, whatever the values."""
    return for_each_result(node, axes.input(node))


MAKERS = (
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
    aten.logspace.default,
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.scalar_tensor.default,
    aten.eye.default,
    aten.eye.m,
    aten.tril_indices.default,
    aten.triu_indices.default,
    aten.hann_window.default,
    aten.rand.default,
    aten.randn.default,
    aten.randint.default,
    aten.randint.low,
    aten.randperm.default,
)

LIKENESSES = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.randint_like.default,
    aten.randint_like.low_dtype,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.zero.default,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.exponential.default,
    aten.uniform.default,
    aten.normal_functional.default,
    aten.native_dropout.default,
)

RULES = {**dict.fromkeys(MAKERS, maker), **dict.fromkeys(LIKENESSES, like)}
