"""Every op rule in one table. Adding an op means adding a line here, or none if torch tags it pointwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from tilecut_passes.axes import (
    rules_contractions,
    rules_convolutions,
    rules_indexing,
    rules_makers,
    rules_normalizations,
    rules_pieces,
    rules_positions,
    rules_reductions,
    rules_views,
    rules_windows,
)
from tilecut_passes.axes.infer import Axes, Rule, elementwise
from tilecut_passes.axes.selection import Selection

aten = torch.ops.aten

# Elementwise in every overload, though torch does not tag them as pointwise: other names of ops that it does, mostly.
ELEMENTWISE = (
    "absolute", "negative", "fix", "multiply", "subtract", "divide", "true_divide", "floor_divide", "rsub", "clip",
    "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "float_power", "ldexp", "nan_to_num",
    "greater", "greater_equal", "less", "less_equal", "not_equal", "isclose", "isreal", "isfinite", "isnan",
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__",
    "hardswish", "log_sigmoid", "_prelu_kernel", "complex", "polar", "conj", "resolve_conj", "resolve_neg", "poisson",
    "special_digamma", "special_erf", "special_erfc", "special_erfinv", "special_exp2", "special_expit",
    "special_expm1", "special_gammainc", "special_gammaincc", "special_gammaln", "special_i0", "special_log1p",
    "special_logit", "special_ndtr", "special_psi", "special_round", "special_sinc", "special_xlogy",
)  # fmt: skip

# Elementwise in some overloads only.
ELEMENTWISE_OVERLOADS = (
    aten.where.self,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.min.other,
    aten.max.other,
    aten.normal.Tensor_float,
    aten.normal.float_Tensor,
    aten.normal.Tensor_Tensor,
)


def _overloads(name: str) -> Iterator[torch._ops.OpOverload]:
    """Every functional overload of an op on tensors."""
    packet: Any = getattr(aten, name)
    for overload in packet.overloads():
        op = getattr(packet, overload)
        if not op._schema.is_mutable and any(isinstance(x.type, torch.TensorType) for x in op._schema.arguments):
            yield op


RULES: dict[object, Rule] = {
    **dict.fromkeys((op for name in ELEMENTWISE for op in _overloads(name)), elementwise),
    **dict.fromkeys(ELEMENTWISE_OVERLOADS, elementwise),
    **rules_views.RULES,
    **rules_pieces.RULES,
    **rules_contractions.RULES,
    **rules_convolutions.RULES,
    **rules_normalizations.RULES,
    **rules_reductions.RULES,
    **rules_windows.RULES,
    **rules_positions.RULES,
    **rules_indexing.RULES,
    **rules_makers.RULES,
}

# What becomes of an op's integer literals when units are selected; ops that are not here have none that matter.
RESIZE: dict[object, Callable[[Axes, fx.Node, Selection], None]] = {
    **rules_views.RESIZE,
    **rules_pieces.RESIZE,
    **rules_convolutions.RESIZE,
    **rules_normalizations.RESIZE,
    **rules_positions.RESIZE,
}
