"""Compute in 16 bits: products in float16 or bfloat16, what loses by it in float32, everything else in what it is given.

Before: a float32 graph. After: every product of matrices and every attention reads 16-bit tensors, its weights cast in the
graph (`open_program` folds those casts); norms, softmax, sums and powers read float32; outputs have the types that they
had. A table of embeddings that a product reads too (tied weights) is read in 16 bits. Which ops go where is PyTorch's
choice for autocast ("Autocast Op Reference").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from tilecut_passes.axes.rules_contractions import MATMULS
from tilecut_passes.axes.rules_convolutions import CONVOLUTIONS
from tilecut_passes.graph import Graph, calls_before, execute, is_call, map_nodes, source, value_of

# Importing them registers the ops of tilecut.
from tilecut_runtime import attention as _attention
from tilecut_runtime import attention_varlen as _attention_varlen
from tilecut_runtime import grouped_matmul as _grouped_matmul
from tilecut_runtime.errors import LoweringError, first_line

assert _attention and _attention_varlen and _grouped_matmul

aten = torch.ops.aten
# q, k and v; masks and slopes stay as they are.
ATTENTION = (torch.ops.tilecut.attention, torch.ops.tilecut.attention_varlen, aten.scaled_dot_product_attention)
PRODUCTS = {
    *(op.overloadpacket for op in (*MATMULS, *CONVOLUTIONS)),
    *(
        aten.linear,
        aten.addmm,
        aten.baddbmm,
        aten.addbmm,
        aten.addmv,
        aten._grouped_mm,
        torch.ops.tilecut.grouped_matmul,
    ),
}
WIDE = {
    *(aten.layer_norm, aten.native_layer_norm, aten.group_norm, aten.native_group_norm, aten.instance_norm),
    *(aten.batch_norm, aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.rms_norm),
    *(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.logsumexp, aten.cross_entropy_loss),
    *(aten.nll_loss, aten.exp, aten.expm1, aten.log, aten.log1p, aten.log2, aten.log10, aten.pow, aten.rsqrt),
    *(aten.reciprocal, aten.sum, aten.mean, aten.var, aten.var_mean, aten.std, aten.prod, aten.cumsum, aten.cumprod),
    *(aten.norm, aten.linalg_vector_norm, aten.dist, aten.softplus, aten.sin, aten.cos, aten.tan),
}
# Fourier transforms and decompositions have no 16-bit kernels.
WIDE_FAMILIES = ("fft_", "_fft", "linalg_", "_linalg", "stft", "istft", "cholesky", "qr", "svd")
# What these choose by is not rounded: a router's scores.
CHOICES = {aten.topk, aten.sort, aten.argmax, aten.argmin}
# These promote by themselves.
PROMOTING = {aten.add, aten.sub, aten.mul, aten.div}


@dataclass(frozen=True)
class ComputeIn:
    """Products and attention in `dtype`, torch.float16 or torch.bfloat16."""

    dtype: torch.dtype

    def match(self, node: fx.Node, exact: Container[fx.Node] = ()) -> torch.dtype | None:
        """The type that a call's floating operands are to have; None where it takes them as they are.

        exact: products that stay in float32.
        """
        op = _op(node)
        if op in PRODUCTS or op in ATTENTION or (op is aten.embedding and _is_tied(node)):
            return torch.float32 if node in exact else self.dtype
        found = {value_of(n).dtype for n in node.all_input_nodes if _is_castable(n)}
        wide = op in WIDE or str(op).removeprefix("aten.").startswith(WIDE_FAMILIES) or self._overflows(node)
        if wide or (len(found) > 1 and op not in PROMOTING):
            return torch.float32
        return None

    def _overflows(self, node: fx.Node) -> bool:
        """Whether a call has a number that the type does not: the lowest float32, which masks are filled with."""
        numbers = (x for x in (*node.args, *node.kwargs.values()) if isinstance(x, int | float))
        return any(torch.finfo(self.dtype).max < abs(x) < math.inf for x in numbers)

    def __call__(self, graph: Graph) -> int:
        """Cast in place; returns the number of calls that became 16-bit ones."""
        count = 0
        casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        exact = _deciding(graph)
        for node in list(graph.nodes):
            if node.op == "output":
                self._restore(graph, node, casts)
            if node.op != "call_function":
                continue
            wanted = self.match(node, exact)
            if wanted is not None:
                with calls_before(graph, node) as call:
                    _cast_operands(node, wanted, call, casts)
            count += wanted == self.dtype
            if any(_is_castable(n) for n in node.all_input_nodes):
                _recompute(graph, node)
            if is_call(node, aten.embedding.default) and value_of(node).dtype == self.dtype:
                _widen(graph, node)
        return count

    def _restore(self, graph: Graph, output: fx.Node, casts: dict[tuple[fx.Node, torch.dtype], fx.Node]) -> None:
        """Results become float32 again."""
        with calls_before(graph, output) as call:
            output.args = map_nodes(lambda n: _cast(n, torch.float32, call, casts), *output.args)


def _deciding(graph: Graph) -> set[fx.Node]:
    """The products that a choice is made by, with no other product between."""
    found: set[fx.Node] = set()
    todo = [n for n in graph.nodes if _op(n) in CHOICES]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if _op(node) in PRODUCTS:
            found.add(node)
            continue
        todo += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return found


def _op(node: fx.Node) -> object:
    """What a call calls, whichever overload."""
    return getattr(node.target, "overloadpacket", None)


def _is_tied(embedding: fx.Node) -> bool:
    """Whether a product reads the table too: one copy of it then serves both."""
    return any(_op(u) in PRODUCTS for u in source(embedding).users)


def _widen(graph: Graph, node: fx.Node) -> None:
    """What reads a call's result reads it as float32."""
    with calls_before(graph, node.next) as call:
        wide = call(aten.to.dtype, node, torch.float32)
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def _is_castable(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _cast(
    node: fx.Node, dtype: torch.dtype, call: Callable[..., fx.Node], casts: dict[tuple[fx.Node, torch.dtype], fx.Node]
) -> fx.Node:
    """A node in a type; the same cast is made once."""
    if not _is_castable(node) or value_of(node).dtype == dtype:
        return node
    if (node, dtype) not in casts:
        casts[node, dtype] = call(aten.to.dtype, node, dtype)
    return casts[node, dtype]


def _cast_operands(node: fx.Node, dtype: torch.dtype, call: Callable[..., fx.Node], casts: Any) -> None:
    one = lambda n: _cast(n, dtype, call, casts)
    if _op(node) in ATTENTION:
        node.args = (*map_nodes(one, *node.args[:3]), *node.args[3:])
    else:
        node.args, node.kwargs = map_nodes(one, node.args, node.kwargs)


def _recompute(graph: Graph, node: fx.Node) -> None:
    """A call's fake value, now that its operands have other types."""
    args, kwargs = map_nodes(value_of, node.args, node.kwargs)
    try:
        with graph.fake_mode(), enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = execute(node, args, kwargs)
    # Every op has its own way to say that it has no such type.
    except Exception as e:
        raise LoweringError(
            "ComputeIn", f"{node.name} ({node.target}) cannot compute in 16 bits: {first_line(e)}", fix="compile in float32"
        ) from e
