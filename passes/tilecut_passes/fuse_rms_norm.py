"""Replace RMS norms, written out, by one `aten.rms_norm`.

Before: x * rsqrt(mean(x^2, -1, keepdim=True) + eps), or x / sqrt(..), the square as pow, square or x * x, the mean as a sum
over the width, the statistics of x or of x in a wider type; then, where there is one, a product with a weight [H], whatever
the weight is made of (Gemma's 1 + w). Or aten._fused_rms_norm.
After: aten.rms_norm(x, [H], weight, eps), without eps 0. In 16 bits x in float32, normalised and cast back is one op on x
in 16 bits, with a weight of that type: it then rounds once, not twice. A weight that is multiplied in float32, before the
cast, keeps the op in float32 between the casts.
Left alone: other spellings of the root (a norm, a clamp instead of eps); a weight that is no vector over the last dimension
stays a product behind the op. With the reason in
`graph.refusals`: a mean over other dimensions, a width that is not static, statistics that something else reads.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.graph import CASTS, Graph, Refusal, arguments, calls_before, is_call, source, value_of

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RmsNorm:
    """One norm: what is normalised, its weight, eps, and the node whose place it takes."""

    x: fx.Node
    width: int
    weight: fx.Node | None
    eps: float | None
    result: fx.Node


@dataclass(frozen=True)
class FuseRmsNorm:
    """Every RMS norm over the last dimension becomes one op."""

    def match(self, node: fx.Node) -> RmsNorm | str | None:
        """The norm whose normalising product or division is `node`, the reason why it cannot be fused, or None."""
        if is_call(node, aten._fused_rms_norm.default):
            return _returned(node)
        for x, chain in _quotients(node):
            found = _average(chain)
            if found is None:
                continue
            squares, width, eps = found
            squared = _square_of(squares)
            if squared is None or (x is not squared and x is not _widened(squared)):
                continue
            if isinstance(width, str):
                return width
            if any(len(one.users) > 1 for one in (*chain, squares)):
                return "its statistics are read by something else"
            return _with_weight(node, squared, width, eps)
        return None

    def __call__(self, graph: Graph) -> int:
        """Fuse in place; returns the number of norms."""
        count = 0
        for node in list(graph.nodes):
            found = self.match(node)
            if isinstance(found, str):
                graph.refusals.append(Refusal("FuseRmsNorm", node.name, found))
            if not isinstance(found, RmsNorm):
                continue
            with calls_before(graph, found.result) as call:
                weight, dtype = found.weight, value_of(found.x).dtype
                if weight is not None and value_of(weight).dtype != dtype:
                    weight = call(aten.to.dtype, weight, dtype)
                made = call(aten.rms_norm.default, found.x, [found.width], weight, found.eps)
            found.result.replace_all_uses_with(made)
            graph.fx.erase_node(found.result)
            count += 1
        return count


def _returned(node: fx.Node) -> RmsNorm | str | None:
    """torch's own norm that also returns its statistics."""
    a = arguments(node)
    read = {user.args[1]: user for user in node.users if is_call(user, operator.getitem)}
    if 0 not in read:
        return None
    if len(read) != len(node.users) or (1 in read and read[1].users):
        return "its statistics are read by something else"
    if len(a["normalized_shape"]) != 1:
        return f"its statistics run over the last {len(a['normalized_shape'])} dimensions, wanted the last one"
    return RmsNorm(a["input"], int(a["normalized_shape"][0]), a["weight"], a["eps"], read[0])


def _quotients(node: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """What a node may normalise, and the calls of the root that it divides by, for every order of its operands."""
    if not is_call(node, aten.div.Tensor, aten.mul.Tensor) or len(node.all_input_nodes) != 2:
        return
    if is_call(node, aten.div.Tensor):
        roots = [(source(node), _root(source(node, 1), 0.5))]
    else:
        roots = [(source(node, i), _root(source(node, 1 - i), -0.5)) for i in (0, 1)]
    for x, chain in roots:
        if chain:
            yield x, chain


def _root(node: fx.Node, power: float) -> list[fx.Node]:
    """The calls that make v ** power of some v, for 0.5 and -0.5, the one that reads v last; none where it is no root."""
    if is_call(node, aten.pow.Tensor_Scalar):
        return [node] if node.args[1] == power else []
    if is_call(node, aten.sqrt.default if power == 0.5 else aten.rsqrt.default):
        return [node]
    inner: list[fx.Node] = []
    if power == -0.5 and is_call(node, aten.reciprocal.default):
        inner = _root(source(node), 0.5)
    # 1 / v is exported as a reciprocal times 1.
    if power == -0.5 and is_call(node, aten.mul.Tensor) and node.args[1] == 1:
        inner = _root(source(node), -0.5)
    return [node, *inner] if inner else []


def _average(chain: list[fx.Node]) -> tuple[fx.Node, int | str, float] | None:
    """The squares whose mean stands under a root, over how many or why that is no norm, and eps.

    The calls between the root and the squares are added to the chain.
    """
    node, eps = source(chain[-1]), 0.0
    if is_call(node, aten.add.Tensor, aten.add.Scalar):
        numbers = [one for one in node.args[:2] if isinstance(one, int | float)]
        if len(numbers) != 1 or arguments(node)["alpha"] != 1:
            return None
        chain.append(node)
        (node,), eps = node.all_input_nodes, float(numbers[0])
    chain.append(node)
    if is_call(node, aten.mean.dim):
        return (*_over_last(node), eps)
    if not is_call(node, aten.div.Tensor, aten.mul.Tensor) or not isinstance(node.args[1], int | float):
        return None
    total, number = source(node), node.args[1]
    if not is_call(total, aten.sum.dim_IntList):
        return None
    chain.append(total)
    squares, width = _over_last(total)
    share = number if is_call(node, aten.mul.Tensor) else 1 / number
    # Nearer than any other number of channels.
    is_mean = isinstance(width, str) or abs(share * width - 1) < 1e-6
    return (squares, width, eps) if is_mean else None


def _over_last(node: fx.Node) -> tuple[fx.Node, int | str]:
    """What a mean or sum runs over, and its width, or what is wrong."""
    a, x = arguments(node), source(node)
    value = value_of(x)
    dims = sorted(d % value.ndim for d in a["dim"] or range(value.ndim))
    if dims != [value.ndim - 1] or not a["keepdim"]:
        return x, f"its mean is over dimensions {dims} of {value.ndim}, wanted the last one, kept"
    if a["dtype"] not in (None, value.dtype):
        return x, f"its mean is made in {a['dtype']} of squares in {value.dtype}"
    width = value.shape[-1]
    return x, width if isinstance(width, int) else "its width is not static"


def _square_of(node: fx.Node) -> fx.Node | None:
    """The x of x ** 2, square(x) or x * x, or None."""
    if not is_call(node, aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor):
        return None
    if is_call(node, aten.pow.Tensor_Scalar):
        return source(node) if node.args[1] == 2 else None
    return source(node) if is_call(node, aten.square.default) or node.args[0] is node.args[1] else None


def _widened(node: fx.Node) -> fx.Node | None:
    """The 16-bit node that a cast makes float32 of, or None."""
    if not is_call(node, *CASTS) or value_of(node).dtype != torch.float32:
        return None
    return source(node) if value_of(source(node)).dtype in HALF else None


def _with_weight(product: fx.Node, x: fx.Node, width: int, eps: float) -> RmsNorm:
    """The norm with what follows its product: a cast back to 16 bits, and a weight."""
    narrow = _widened(x)
    user = _only_user(product)
    if narrow is not None and is_call(user, *CASTS) and value_of(user).dtype == value_of(narrow).dtype:
        weight, result = _weight(user, width, exact=True)
        return RmsNorm(narrow, width, weight, eps, result)
    weight, result = _weight(product, width, exact=False)
    return RmsNorm(x, width, weight, eps, result)


def _weight(node: fx.Node, width: int, exact: bool) -> tuple[fx.Node | None, fx.Node]:
    """The weight that `node` alone is multiplied by, and the product; None and `node` where there is none.

    exact: the weight has to have the node's type; else a narrower one will do.
    """
    user = _only_user(node)
    if not is_call(user, aten.mul.Tensor):
        return None, node
    other = next((one for one in user.args[:2] if isinstance(one, fx.Node) and one is not node), None)
    value = None if other is None else value_of(other)
    if not isinstance(value, Tensor) or list(value.shape) != [width] or not value.dtype.is_floating_point:
        return None, node
    kept = value.dtype == value_of(node).dtype if exact else value_of(user).dtype == value_of(node).dtype
    return (other, user) if kept else (None, node)


def _only_user(node: fx.Node) -> Any:
    """The one node that reads another, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None
