"""Every op rule in one table. Adding an op means adding a line here, or none if torch tags it pointwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from tilecut_passes.axes import rules_contractions, rules_indexing, rules_normalizations, rules_views
from tilecut_passes.axes.infer import Axes, Rule, elementwise
from tilecut_passes.axes.selection import Selection

aten = torch.ops.aten

# Elementwise ops that torch does not tag as pointwise.
ELEMENTWISE = (
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten.where.self,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.min.other,
    aten.max.other,
    aten.floor_divide.default,
)

RULES: dict[object, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **rules_views.RULES,
    **rules_contractions.RULES,
    **rules_normalizations.RULES,
    **rules_indexing.RULES,
}

# What becomes of an op's integer literals when units are selected; ops that are not here have none that matter.
RESIZE: dict[object, Callable[[Axes, fx.Node, Selection], None]] = {**rules_views.RESIZE, **rules_normalizations.RESIZE}
