"""Packed segments as `tilecut::attention_varlen`: where each sequence begins, and the rows of a batch laid end to end.

Before: q [B, H, S, D], k and v alike, and a mask that means segments of `position_ids`, perhaps causal, with a window.
After: rows [B * S, H, D] and cu_seqlens int32 [N + 1], made once for all attentions whose segments are the same:

    starts      a position that is 0, or not the one before plus 1; an id that is not the one before; the first of a row
    cu_seqlens  nonzero(starts of all rows, and one more at the end)

N is decided by the data: torch.export writes it as a size of its own (an unbacked symbol). A table of B * S + 1 bounds
padded with empty sequences would have a size that is known, and make every launch start programs for B * S sequences.

A segment must be one run of tokens. That is certain of positions and of a running count (`cumsum` of a truth); plain
equal ids may come back later in a row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.graph import (
    PACKED_ATTENTION,
    Graph,
    Size,
    arguments,
    before_casts,
    calls_before,
    is_call,
    size_arguments,
    sizes_of,
    source,
    value_of,
)
from tilecut_passes.mask_atoms import Segments
from tilecut_passes.recognize_mask import MaskMeaning

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """The bounds of a graph's sequences [N + 1], and the B and S of the batch that they lie in."""

    bounds: fx.Node
    batch: int | fx.Node
    length: int | fx.Node


def unpackable(graph: Graph, meaning: MaskMeaning, q: fx.Node, k: fx.Node) -> str | None:
    """Why the packed op cannot hold a mask that has segments, for q [B, H, Sq, D] and k [B, H, Sk, D]; None where it can."""
    others = {
        f"chunks of {meaning.chunk}": meaning.chunk,
        "padding": meaning.paddings or meaning.queries,
        "a bias": meaning.bias,
        "global tokens": meaning.global_tokens,
    }
    if beside := [what for what, there in others.items() if there]:
        return f"{beside[0]} beside segments cannot be written as sequences"
    batch, _, length, _ = sizes_of(value_of(q))
    if sizes_of(value_of(k))[2] != length:
        return f"segments of {length} queries and {sizes_of(value_of(k))[2]} keys"
    for one in meaning.segments:
        node = named_node(graph, one.source)
        if one.kind == "ids" and not _counts_truths(node):
            return f"equal values of {one.source} may come back later in a row: nothing says that a segment is one run"
        rows, columns = sizes_of(value_of(node))
        if columns != length or rows not in (1, batch) or (rows != batch and _input_of_size(graph, batch) is None):
            return f"{one.source} is [{rows}, {columns}] for a batch of {batch} and {length} positions"
    return None


def named_node(graph: Graph, name: str) -> fx.Node:
    """The input or the inner node of a name."""
    return graph.input_node(name) or next(n for n in graph.nodes if n.name == name)


def find_rows(graph: Graph, segments: tuple[Segments, ...], q: fx.Node) -> Rows:
    """Make the bounds of segments that are packable: at the top of the graph, or behind the node that they come from."""
    nodes = [named_node(graph, one.source) for one in segments]
    inner = [n for n in nodes if n.op != "placeholder"]
    order = {n: i for i, n in enumerate(graph.nodes)}
    before = max(inner, key=order.__getitem__).next if inner else graph.first_call()
    size = sizes_of(value_of(q))[0]
    with calls_before(graph, before) as call:
        starts = _starts(call, segments[0].kind, nodes[0])
        for one, node in zip(segments[1:], nodes[1:]):
            starts = call(aten.logical_or.default, starts, _starts(call, one.kind, node))
        (length,) = size_arguments(graph, nodes[0], [1], before)
        place = call(aten.arange.default, length, device=value_of(nodes[0]).device)
        # A row begins a sequence.
        starts = call(aten.logical_or.default, starts, call(aten.eq.Scalar, place, 0))
        whole = next((n for n in nodes if sizes_of(value_of(n))[0] == size), None) or _input_of_size(graph, size)
        batch = size if isinstance(size, int) else size_arguments(graph, whole, [0], before)[0]  # type: ignore[arg-type]
        if sizes_of(value_of(starts))[0] != size:
            starts = call(aten.expand.default, starts, [batch, -1])
        starts = call(aten.constant_pad_nd.default, call(aten.reshape.default, starts, [-1]), [0, 1], 1)
        first = call(aten.reshape.default, call(aten.nonzero.default, starts), [-1])
        return Rows(call(aten._to_copy.default, first, dtype=torch.int32), batch, length)


def packed_attention(
    call: Callable[..., fx.Node],
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    slopes: fx.Node | None,
    rows: Rows,
    meaning: MaskMeaning,
    scale: float,
    softcap: float,
) -> fx.Node:
    """The packed op for q [B, Hq, S, D], k [B, Hk, S, D], v [B, Hk, S, E], its result as [B, Hq, S, E]."""
    end_to_end = [call(aten.flatten.using_ints, call(aten.transpose.int, x, 1, 2), 0, 1) for x in (q, k, v)]
    both = call(
        PACKED_ATTENTION,
        *end_to_end,
        rows.bounds,
        rows.bounds,
        None,
        None,
        slopes,
        max_q=rows.length,
        max_k=rows.length,
        scale=scale,
        causal=meaning.causal,
        window=list(meaning.window),
        global_tokens=0,
        softcap=softcap,
        dropout_p=0.0,
    )
    out = call(operator.getitem, both, 0)
    _, heads, width = value_of(out).shape
    return call(aten.transpose.int, call(aten.reshape.default, out, [rows.batch, rows.length, heads, width]), 1, 2)


def _starts(call: Callable[..., fx.Node], kind: str, node: fx.Node) -> fx.Node:
    """Whether a position begins a segment, bool [B, S]; the first of a row is left open."""
    if kind == "restarts":
        return call(aten.eq.Scalar, node, 0)
    # Slices of S - 1 would have the program assert that S is not 2.
    before = call(aten.constant_pad_nd.default, node, [1, -1])
    if kind == "breaks":
        return call(aten.ne.Scalar, call(aten.sub.Tensor, node, before), 1)
    return call(aten.ne.Tensor, node, before)


def _counts_truths(node: fx.Node) -> bool:
    """Whether a node [B, S] counts, along its rows, how often something was true: it never falls."""
    if not is_call(node, aten.cumsum.default) or arguments(node)["dim"] not in (1, -1):
        return False
    return value_of(before_casts(source(node))).dtype == torch.bool


def _input_of_size(graph: Graph, size: Size) -> fx.Node | None:
    """An input whose rows are that many."""
    return next((n for n in graph.placeholders if sizes_of(value_of(n))[:1] == [size]), None)
