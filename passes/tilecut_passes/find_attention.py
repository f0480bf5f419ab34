"""Find attention in every spelling: what are its queries, keys and values, its scale, its soft-cap and its mask.

Spellings:
    fused       aten.scaled_dot_product_attention(q, k, v, mask), q [B, H, S, D] or [N, S, D]
    written     matmul, bmm or baddbmm of q and k; a chain of steps on the scores; softmax over the keys, in any dtype;
                casts, reshapes and dropouts that do nothing; matmul or bmm with v
Steps on the scores: multiplied or divided by a constant, a mask or bias added, masked_fill and where with a value that
hides, `c * tanh(scores / c)`, a lower bound that hides, casts, reshapes of the leading dimensions. The scale is the
product of the constants in the chain and of those on the way to q and k. It is read off the structure: exact, where
probing the chain with numbers would have to be rounded back to the literal.

A mask in the chain is told from the scores by what it does to a score of 0: `steps` applied to zero is the additive
mask, whatever the spelling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, arguments, is_call, size_of, sizes_of, source, symbols_of, value_of
from tilecut_passes.mask_probes import MASKED, constant_of

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout)
# Views and copies: with singletons moved about at most, they keep the order of the elements.
LAYOUTS = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.permute.default, aten.transpose.int, aten.expand.default, aten.clone.default,
    aten.contiguous.default, aten.unflatten.int, aten.flatten.using_ints,
)  # fmt: skip
FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
BOUNDS = (aten.clamp_min.default, aten.clamp.default, aten.maximum.default, aten.max.other)


@dataclass(frozen=True)
class Step:
    """One call on the way from the scores to the softmax, and which of its arguments the scores are."""

    node: fx.Node
    index: int


@dataclass(frozen=True)
class Operand:
    """q, k or v as the op takes it: `layout` calls on `source`, its factor apart; keys with `swapped` last dimensions."""

    source: fx.Node
    layout: tuple[fx.Node, ...] = ()
    swapped: bool = False


@dataclass(frozen=True)
class Attention:
    """What `find_attention` found.

    Attributes:
        result: the node whose value the attention is: [B, H, Sq, E], or [B * H, Sq, E] where `heads` is set.
        heads: how many heads lie within the first dimension of all operands; None where they lie apart.
        scale, softcap: as `tilecut::attention` takes them.
        mask: what is added to the scores or says which are seen, of a fused attention; None where it is written out.
        is_causal: the flag of a fused attention.
        product, steps: of a written one, the score matmul and the calls between it and the softmax.
    """

    result: fx.Node
    q: Operand
    k: Operand
    v: Operand
    heads: int | None
    scale: float
    softcap: float = 0.0
    mask: fx.Node | None = None
    is_causal: bool = False
    product: fx.Node | None = None
    steps: tuple[Step, ...] = ()

    @property
    def masks(self) -> tuple[fx.Node, ...]:
        """The nodes that masks and biases come from."""
        if self.product is None:
            return () if self.mask is None else (self.mask,)
        others = [n for s in self.steps for n in s.node.all_input_nodes if n is not s.node.args[s.index]]
        return tuple(dict.fromkeys([*([source(self.product)] if is_batched_add(self.product) else []), *others]))


def is_batched_add(node: fx.Node) -> bool:
    """Whether a score matmul adds a mask itself."""
    return is_call(node, aten.baddbmm.default)


def find_attention(graph: Graph, node: fx.Node) -> Attention | str | None:
    """The attention whose softmax or fused call `node` is, the reason why it is left alone, or None where it is none."""
    if is_call(node, aten.scaled_dot_product_attention.default):
        return _fused(node)
    if is_call(node, *SOFTMAXES) and weighs_values(node):
        return _written(graph, node)
    return None


def weighs_values(softmax: fx.Node) -> bool:
    """Whether what a softmax gives is the left side of a matmul, perhaps after a cast, a view or a dropout."""
    for user in softmax.users:
        if is_call(user, *PRODUCTS[:2]):
            if user.args[0] is softmax:
                return value_of(user).ndim >= 3
        elif is_call(user, *CASTS, *LAYOUTS, aten.dropout.default) and weighs_values(user):
            return True
    return False


def _fused(node: fx.Node) -> Attention | str:
    a = arguments(node)
    q, k, v = (value_of(a[name]) for name in ("query", "key", "value"))
    if a["dropout_p"]:
        return f"it has dropout {a['dropout_p']}"
    if q.ndim not in (3, 4) or k.ndim != q.ndim or v.ndim != q.ndim:
        return f"q has rank {q.ndim}, k {k.ndim} and v {v.ndim}, wanted 3 or 4 each"
    scale = a["scale"] if a["scale"] is not None else int(q.shape[-1]) ** -0.5
    heads = None if q.ndim == 4 else _coefficient(q)
    q, of_q = _operand(a["query"], heads, scaled=True)
    k, of_k = _operand(a["key"], heads, scaled=True)
    v, _ = _operand(a["value"], heads, scaled=False)
    found = Attention(node, q, k, v, heads, scale * of_q * of_k, mask=a["attn_mask"], is_causal=a["is_causal"])
    return _checked(found)


def _written(graph: Graph, softmax: fx.Node) -> Attention | str:
    rank = value_of(softmax).ndim
    if arguments(softmax)["dim"] % rank != rank - 1:
        return "its softmax does not run over the keys"
    result = _weighted_sum(softmax)
    if isinstance(result, str):
        return result
    chain = _Chain(graph).read(softmax)
    if isinstance(chain, str):
        return chain
    product, steps, scale, softcap = chain
    first = 1 if is_batched_add(product) else 0
    if is_batched_add(product):
        scale *= float(arguments(product)["alpha"])
    left, right = cast(fx.Node, product.args[first]), cast(fx.Node, product.args[first + 1])
    rank = value_of(left).ndim
    if rank not in (3, 4) or value_of(right).ndim != rank:
        return f"q has rank {rank} and k {value_of(right).ndim}, wanted 3 or 4 each"
    heads = None if rank == 4 else _heads_apart(value_of(left), steps)
    values = source(result, 1)
    if (value_of(values).ndim == 4) != (rank == 4):
        return f"q has rank {rank} and v {value_of(values).ndim}"
    q, of_q = _operand(left, heads, scaled=True)
    k, of_k = _operand(right, heads, scaled=True, keys=True)
    v, _ = _operand(values, heads, scaled=False)
    return _checked(Attention(result, q, k, v, heads, scale * of_q * of_k, softcap, product=product, steps=steps))


def _checked(found: Attention) -> Attention | str:
    """The attention, or the reason why its scale is none that the op takes."""
    if not 0 < found.scale < math.inf or not 0 <= found.softcap < math.inf:
        return f"its scale is {found.scale:.6g} and its soft-cap {found.softcap:.6g}, wanted above 0"
    return found


def _weighted_sum(softmax: fx.Node) -> fx.Node | str:
    """The matmul of attention weights and values, or the reason why the weights cannot be left out of the graph."""
    node = softmax
    while True:
        users = [u for u in node.users if not is_call(u, aten._assert_tensor_metadata.default)]
        if any(u.op == "output" for u in users):
            return "its attention weights are an output of the model"
        if len(users) != 1:
            others = ", ".join(str(u.target) for u in users if not is_call(u, *PRODUCTS))
            return f"its attention weights are read by other calls too ({others or 'two matmuls'})"
        (user,) = users
        if is_call(user, *PRODUCTS[:2]) and user.args[0] is node:
            return user
        if is_call(user, aten.dropout.default) and arguments(user)["train"]:
            return f"it has dropout {arguments(user)['p']}"
        if not is_call(user, *CASTS, aten.dropout.default) and not keeps_pairs(user):
            return f"its attention weights pass {user.target}"
        node = user


class _Chain:
    """Reads the calls between a score matmul and a softmax, backwards."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.known: dict[fx.Node, tuple[fx.Node, tuple[Step, ...]] | str] = {}

    def read(self, softmax: fx.Node) -> tuple[fx.Node, tuple[Step, ...], float, float] | str:
        """The score matmul, the steps from it on, scale and soft-cap; or the reason why it is no such chain."""
        found = self._path(source(softmax))
        if isinstance(found, str):
            return found
        product, steps = found
        # `outer`: what a value at this place is multiplied by before the softmax (or the tanh).
        outer, cap = 1.0, 0.0
        for step in reversed(steps):
            node = step.node
            if is_call(node, *FACTORS):
                outer *= self._factor(step)
            elif is_call(node, aten.tanh.default):
                if cap:
                    return "its scores pass two tanh"
                cap, outer = outer, 1.0
            elif cap and not is_call(node, *CASTS, *LAYOUTS):
                return f"{node.target} comes before the soft-cap"
            elif (hidden := self._hidden(step)) is not None and not hidden * outer <= MASKED:
                return f"{node.target} sets scores to {hidden * outer:.6g}, which does not hide them"
            elif is_call(node, aten.sub.Tensor) and step.index == 1:
                outer = -outer
        if cap and is_batched_add(product):
            return "a mask is added before the soft-cap"
        return product, steps, outer * cap if cap else outer, cap

    def _path(self, node: fx.Node) -> tuple[fx.Node, tuple[Step, ...]] | str:
        if node not in self.known:
            self.known[node] = self._behind(node)
        return self.known[node]

    def _behind(self, node: fx.Node) -> tuple[fx.Node, tuple[Step, ...]] | str:
        value = value_of(node)
        if is_call(node, *PRODUCTS) and value.ndim >= 3 and all(value_of(n).ndim >= 3 for n in node.all_input_nodes):
            return node, ()
        alone = is_call(node, *CASTS, aten.tanh.default, *FILLS) or keeps_pairs(node) or _does_nothing(node)
        if not alone and not is_call(node, *FACTORS, *SUMS, *WHERES, *BOUNDS):
            return f"its scores come from {node.target}, not from a matmul of queries and keys"
        if is_call(node, *SUMS) and arguments(node)["alpha"] != 1:
            return f"{node.target} has alpha {arguments(node)['alpha']}"
        places = [0] if alone else [i for i, a in enumerate(node.args) if isinstance(a, fx.Node)]
        if is_call(node, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            places = places[1:]
        paths = {i: self._path(source(node, i)) for i in places}
        found = {i: p for i, p in paths.items() if not isinstance(p, str)}
        if len(found) > 1:
            return "its scores are made of two matmuls"
        if not found:
            return next(iter(paths.values()))  # type: ignore[return-value]
        ((index, path),) = found.items()
        assert not isinstance(path, str)
        step = Step(node, index)
        if is_call(node, *FACTORS) and ((index == 1 and "div" in str(node.target)) or self._factor_of(step) is None):
            return f"its scores are multiplied by {node.target} with no constant"
        if is_call(node, *WHERES, *FILLS, *BOUNDS) and self._hidden(step) is None:
            return f"{node.target} sets scores to no constant"
        return path[0], (*path[1], step)

    def _factor(self, step: Step) -> float:
        factor = self._factor_of(step)
        assert factor is not None
        return factor

    def _factor_of(self, step: Step) -> float | None:
        other = _number(self.graph, step.node.args[1 - step.index])
        if other is None or "div" not in str(step.node.target):
            return other
        return 1 / other

    def _hidden(self, step: Step) -> float | None:
        """The constant that takes the place of scores, where a step does that."""
        node = step.node
        if is_call(node, *FILLS):
            return _number(self.graph, node.args[2])
        if is_call(node, *WHERES):
            return _number(self.graph, node.args[3 - step.index])
        if is_call(node, *BOUNDS):
            a = arguments(node)
            if is_call(node, aten.clamp.default) and a["max"] is not None:
                return None
            return _number(self.graph, node.args[1 - step.index])
        return None


def _number(graph: Graph, given: Any) -> float | None:
    """A literal, or what a constant tensor of one element holds; None for anything else."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    if isinstance(given, fx.Node) and isinstance(value_of(given), Tensor) and value_of(given).numel() == 1:
        found = constant_of(graph, given)
        return None if found is None else float(found.reshape(()))
    return None


def scalar_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The tensor and the literal of x * c or x / c; None for any other call."""
    if not is_call(node, *FACTORS):
        return None
    x, c = node.args[:2]
    if isinstance(x, int | float) and "mul" in str(node.target):
        x, c = c, x
    if not isinstance(x, fx.Node) or not isinstance(c, int | float) or isinstance(c, bool) or not c:
        return None
    if not value_of(x).is_floating_point():
        return None
    return x, (float(c) if "mul" in str(node.target) else 1 / float(c))


def _does_nothing(node: fx.Node) -> bool:
    return is_call(node, aten.dropout.default) and not arguments(node)["train"]


def keeps_order(node: fx.Node) -> bool:
    """Whether a call gives its input's elements in their order: a reshape, or a permutation that moves only ones."""
    if not is_call(node, *LAYOUTS):
        return False
    before, after = sizes_of(value_of(source(node))), sizes_of(value_of(node))
    if is_call(node, aten.transpose.int, aten.permute.default):
        return [s for s in _permuted(node)[0] if before[s] != 1] == [s for s in range(len(before)) if before[s] != 1]
    return not is_call(node, aten.expand.default) or [s for s in before if s != 1] == [s for s in after if s != 1]


def keeps_pairs(node: fx.Node) -> bool:
    """Whether a call keeps the order of elements, and queries and keys the last two dimensions but for ones."""
    if not keeps_order(node):
        return False
    before, after = ([s for s in sizes_of(value_of(n)) if s != 1][-2:] for n in (source(node), node))
    return before == after


def _permuted(node: fx.Node) -> tuple[list[int], int]:
    """A permutation's order of dimensions, and the rank."""
    rank = value_of(node).ndim
    order = list(range(rank))
    if is_call(node, aten.permute.default):
        order = [cast(int, d) % rank for d in cast(list[int], node.args[1])]
    else:
        i, j = (cast(int, d) % rank for d in node.args[1:3])
        order[i], order[j] = order[j], order[i]
    return order, rank


def _heads_apart(value: Tensor, steps: tuple[Step, ...]) -> int:
    """How many heads lie within the first dimension: what the scores are reshaped to, or the dimension's own factor."""
    for step in steps:
        after = value_of(step.node)
        if is_call(step.node, *LAYOUTS) and after.ndim == 4 and isinstance(after.shape[1], int):
            return after.shape[1]
    return _coefficient(value)


def _coefficient(value: Tensor) -> int:
    size = size_of(value.shape[0])
    if isinstance(size, int) or not symbols_of(size):
        return 1
    coefficient = cast(sympy.Expr, size).as_coeff_Mul()[0]
    return int(coefficient) if coefficient.is_Integer else 1


def _operand(node: fx.Node, heads: int | None, scaled: bool, keys: bool = False) -> tuple[Operand, float]:
    """What the op takes for a matmul's operand, and the factor that was peeled off it."""
    swapped = False
    if keys:
        swapped = not (is_call(node, aten.transpose.int) and _swaps_last(node))
        node = node if swapped else source(node)
    # Heads apart, as they were before they were folded into the batch.
    if heads is not None and (whole := _unfolded(node, heads)) is not None:
        node = whole
    if not scaled:
        return Operand(node, swapped=swapped), 1.0
    layout: list[fx.Node] = []
    inner = node
    while True:
        if (found := scalar_factor(inner)) is not None:
            made, factor = _operand(found[0], None, scaled=True)
            return Operand(made.source, (*made.layout, *reversed(layout)), swapped), factor * found[1]
        if not is_call(inner, *LAYOUTS):
            return Operand(node, swapped=swapped), 1.0
        layout.append(inner)
        inner = source(inner)


def _swaps_last(node: fx.Node) -> bool:
    order, rank = _permuted(node)
    return order == [*range(rank - 2), rank - 1, rank - 2]


def _unfolded(node: fx.Node, heads: int) -> fx.Node | None:
    """The [B, heads, S, D] that a [B * heads, S, D] is a reshape of, or None."""
    wanted = sizes_of(value_of(node))[1:]
    while is_call(node, *LAYOUTS) and keeps_order(node):
        node = source(node)
        sizes = sizes_of(value_of(node))
        if len(sizes) == 4 and sizes[1:] == [heads, *wanted]:
            return node
    return None
