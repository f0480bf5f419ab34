"""A window and global tokens as an additive bias, for targets whose fused attention takes a bias and no window."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tilecut_passes.graph import Graph, arguments, calls_before, size_arguments, value_of

aten = torch.ops.aten


def window_bias(graph: Graph, node: fx.Node, before: fx.Node) -> fx.Node | None:
    """[1, 1, Sq, Sk], placed before `before`: 0 where the window of a `tilecut::attention` lets through, else half of
    the least number, as `finite` has it; None where there is no window.
    """
    a = arguments(node)
    left, right = a["window"]
    if left < 0 and right < 0:
        return None
    dtype, device = value_of(a["q"]).dtype, value_of(a["q"]).device
    (sq,), (sk,) = (size_arguments(graph, a[name], [2], before) for name in "qk")
    with calls_before(graph, before) as call:

        def ramp(size: Any) -> fx.Node:
            return call(aten.arange.default, size, device=device)

        queries, keys = call(aten.unsqueeze.default, ramp(sq), 1), ramp(sk)
        if a["causal"] != "top_left" and value_of(a["q"]).shape[2] is not value_of(a["k"]).shape[2]:
            queries = call(aten.add.Tensor, queries, _difference(call, sk, sq))
        behind = call(aten.sub.Tensor, queries, keys)
        outside = [call(aten.gt.Scalar, behind, left)] if left >= 0 else []
        outside += [call(aten.lt.Scalar, behind, -right)] if right >= 0 else []
        hidden = outside[0] if len(outside) == 1 else call(aten.logical_or.default, *outside)
        if n := a["global_tokens"]:
            for places in (queries, keys):
                hidden = call(aten.logical_and.default, hidden, call(aten.ge.Scalar, places, n))
        shape = [1, 1, sq, sk]
        zeros = call(aten.zeros.default, shape, dtype=dtype, device=device)
        return call(aten.masked_fill.Scalar, zeros, hidden, torch.finfo(dtype).min / 2)


def _difference(call: Any, sk: Any, sq: Any) -> Any:
    return sk - sq if isinstance(sk, int) and isinstance(sq, int) else call(operator.sub, sk, sq)
