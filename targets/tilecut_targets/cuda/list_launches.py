"""Which launches of the attention kernels a graph will ask a GPU for.

Sizes that are free in the graph are no part of a binary, but a stride's divisibility by 16 is, and few queries go to the
kernels of their own. So every attention is planned at three points: sizes divisible by 16, sizes that are not, and the
smallest that the graph takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, arguments, number_of, value_of
from tilecut_runtime import attention, attention_varlen
from tilecut_runtime.attention_checks import HEAD_WIDTH_LIMIT
from tilecut_runtime.errors import LoweringError
from tilecut_runtime.kernels.choose_tile import shipped_tile
from tilecut_runtime.launch_attention import Launch, plan_forward

DENSE = torch.ops.tilecut.attention.default
PACKED = torch.ops.tilecut.attention_varlen.default
ALIGNED, ODD = 128, 67
# What besides q, k and v an op's tensors are, and how the launcher takes them.
INPUTS: dict[object, tuple[tuple[str, ...], Callable[..., dict[str, Any]]]] = {
    DENSE: (("key_padding", "bias", "alibi_slopes", "dropout_seed"), attention.kernel_inputs),
    PACKED: (
        ("cu_seqlens_q", "cu_seqlens_k", "block_offsets", "block_indices", "alibi_slopes", "dropout_seed"),
        attention_varlen.kernel_inputs,
    ),
}
# Of sizes that data decide, such as how many sequences are packed.
UNKNOWN = 4


def list_launches(graph: Graph, arch: str) -> Iterator[Launch]:
    """The launches of every attention at every point, with the tiles of an architecture; tensors are on "meta"."""
    for at in points(graph):
        for node in graph.nodes:
            if node.op == "call_function" and node.target in INPUTS:
                yield from _launches(node, at, arch)


def points(graph: Graph) -> list[dict[sympy.Symbol, int]]:
    """Values of the graph's dynamic sizes, within their ranges."""
    return [
        {symbol: graph.ranges[name].nearest(wanted) for symbol, name in graph.dims.items()}
        for wanted in (ALIGNED, ODD, 1)
    ]


def _launches(node: fx.Node, at: Mapping[sympy.Symbol, int], arch: str) -> list[Launch]:
    a = {name: _on_meta(given, at) for name, given in arguments(node).items()}
    q, k, v = (a.pop(name) for name in "qkv")
    names, inputs = INPUTS[node.target]
    given = inputs(**{name: a.pop(name) for name in names})
    width, bits = max(k.shape[-1], v.shape[-1]), 8 * q.element_size()
    if width > HEAD_WIDTH_LIMIT:
        raise LoweringError(
            "list_launches", f"{node.name}: the kernels have no heads that wide", got=width,
            wanted=f"at most {HEAD_WIDTH_LIMIT}", fix="another target",
        )  # fmt: skip
    # What was tuned for the machine that compiles is not for others.
    tiles = {direction: shipped_tile(arch, direction, width, bits) for direction in ("forward", "decode")}
    if node.target is DENSE:
        a |= {"max_q": q.shape[2], "max_k": k.shape[2]}
    return plan_forward(*attention.last_contiguous(q, k, v), tiles=tiles, **given, **a)[2]


def _on_meta(given: Any, at: Mapping[sympy.Symbol, int]) -> Any:
    """A node's value, or a size, at the point."""
    value = value_of(given) if isinstance(given, fx.Node) else given
    if isinstance(value, Tensor):
        sizes, strides = ([_number(s, at) for s in of] for of in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
    if isinstance(value, torch.SymInt):
        return _number(value, at)
    if isinstance(value, list | tuple):
        return [_on_meta(one, at) for one in value]
    return value


def _number(size: int | torch.SymInt, at: Mapping[sympy.Symbol, int]) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return number_of(expression, {**dict.fromkeys(expression.free_symbols, UNKNOWN), **at})
