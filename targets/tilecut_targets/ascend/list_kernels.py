"""Which forms of the Ascend attention kernel a graph's attentions need, and which of them the kernel does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from tilecut_passes.graph import Graph, Refusal, Size, arguments, number_of, sizes_of, value_of
from tilecut_targets.ascend.plan_kernel import Variant

DENSE = torch.ops.tilecut.attention.default
PACKED = torch.ops.tilecut.attention_varlen.default
FRACTAL, MAX_WIDTH = 16, 256
# Lengths that are fixed multiples of it need no masks at their end: a tile that divides them is large enough.
WHOLE = 64
# Of sizes without a bound.
LONG = 4096
# A tile is chosen for a quarter of the longest sequence, since most are shorter and a tile's empty end is work too; for no
# fewer than these.
SHARE, SHORT = 4, 64


@dataclass(frozen=True)
class Wanted:
    """A form of the kernel, the numbers of queries and keys to choose its tile for, and the nodes that it is for."""

    variant: Variant
    nq: int
    nk: int
    nodes: tuple[str, ...]


def list_kernels(graph: Graph) -> tuple[list[Wanted], list[Refusal]]:
    """One entry for each form, in the graph's order, and the attentions that none is for.

    Attentions of one form share a kernel: heads, batch and lengths are its arguments. Inputs of float32 are computed in
    float16, as CANN's fused attention does.
    """
    found: dict[Variant, Wanted] = {}
    refusals = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (DENSE, PACKED):
            continue
        why = _refuse(node)
        if why is not None:
            refusals.append(Refusal("list_kernels", node.name, why))
            continue
        wanted = _wanted(graph, node)
        if wanted.variant in found:
            have = found[wanted.variant]
            longest = {"nq": max(have.nq, wanted.nq), "nk": max(have.nk, wanted.nk)}
            wanted = replace(have, **longest, nodes=(*have.nodes, node.name))
        found[wanted.variant] = wanted
    return list(found.values()), refusals


def _refuse(node: fx.Node) -> str | None:
    if node.target is PACKED:
        return "packed segments: the kernel takes padded ones"
    a = arguments(node)
    if a["bias"] is not None:
        return "an additive bias"
    if a["alibi_slopes"] is not None:
        return "ALiBi slopes"
    for option in ("softcap", "global_tokens", "dropout_p"):
        if a[option]:
            return f"{option} {a[option]}"
    for width in (value_of(a["q"]).shape[-1], value_of(a["v"]).shape[-1]):
        if not isinstance(width, int) or width % FRACTAL or width > MAX_WIDTH:
            return f"head width {width}: the kernel takes multiples of {FRACTAL} up to {MAX_WIDTH}"
    return None


def _wanted(graph: Graph, node: fx.Node) -> Wanted:
    a = arguments(node)
    q, v = value_of(a["q"]), value_of(a["v"])
    left, right = a["window"]
    causal = a["causal"]
    nq, nk = sizes_of(q)[2], sizes_of(v)[2]
    variant = Variant(
        width=q.shape[-1],
        value_width=v.shape[-1],
        dtype="bfloat16" if q.dtype == torch.bfloat16 else "float16",
        causal=causal,
        left=left,
        # A causal row sees nothing on its right.
        right=-1 if causal != "none" else right,
        padding=a["key_padding"] is not None,
        tail=not (isinstance(nq, int) and isinstance(nk, int) and nq % WHOLE == 0 and nk % WHOLE == 0),
    )
    return Wanted(variant, _usual(graph, nq), _usual(graph, nk), (node.name,))


def _usual(graph: Graph, size: Size) -> int:
    if isinstance(size, int):
        return size
    return max(number_of(size, _largest(graph, size.free_symbols)) // SHARE, SHORT)


def _largest(graph: Graph, symbols: Any) -> Mapping[sympy.Symbol, int]:
    at = {}
    for symbol in symbols:
        limits = graph.ranges[graph.dims[symbol]] if symbol in graph.dims else None
        at[symbol] = LONG if limits is None or limits.max is None else limits.max
    return at
