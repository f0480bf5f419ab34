"""Lower `tilecut::rotary` to com.microsoft::RotaryEmbedding of onnxruntime's CPU provider.

Before: tilecut::rotary(x [B, H, S, D], cos, sin [B|1, 1, S, D]), or x [B, S, H, D] and tables [B|1, S, 1, D].
After: RotaryEmbedding(x, positions, cos, sin), with tables half as wide: the op wants one number a pair. Where x is a
linear layer's output with its heads set apart, the op works on [B, S, H*D] and they are set apart behind it, where
attention folds them again. Tables are cut once for all embeddings that share them; those that hold rows of a constant table
at positions [B, S] (`tabulate_positions.py`) are that table, cut at compile time, and the op reads the positions.
Left alone, with the reason in `graph.refusals`: tables of other shapes, such as one for every head, and those whose pairs
are not seen to hold one number each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilecut_passes.fuse_rotary import dimension_of_heads
from tilecut_passes.graph import (
    CASTS,
    Graph,
    Refusal,
    arguments,
    calls_before,
    is_call,
    sizes_of,
    source,
    swaps_heads,
    value_of,
)
from tilecut_passes.tabulate_positions import half_of_pairs, table_behind
from tilecut_targets.edge import ort_ops

aten = torch.ops.aten
# Ops that give every element from the elements of one place.
POINTWISE = (
    aten.cos.default, aten.sin.default, aten.neg.default, aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor,
    aten.div.Tensor, aten.alias.default, aten.clone.default, aten.contiguous.default, *CASTS,
)  # fmt: skip
# Ops that move whole rows where the last dimension keeps its size.
MOVING = (
    aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.index.Tensor, aten.index_select.default,
    aten.reshape.default, aten.flatten.using_ints,
)  # fmt: skip


@dataclass(frozen=True)
class LowerRotary:
    """Every rotary embedding whose pairs share a number becomes one op."""

    def match(self, node: fx.Node) -> str | None:
        """Why the op cannot express this embedding, or None when it can."""
        if _heads(node) is None:
            return "its tables are not [B|1, 1, S, D] to [B, H, S, D], or with S and H exchanged"
        interleaved = bool(node.kwargs["interleaved"])
        if any(pair_chain(source(node, i), interleaved) is None for i in (1, 2)):
            return "the two channels of a pair are not seen to share one cosine and sine"
        return None

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of embeddings."""
        count = 0
        made: dict[tuple[fx.Node, bool], fx.Node] = {}
        places: dict[fx.Node, fx.Node] = {}
        halves: dict[tuple[fx.Node, bool], fx.Node] = {}
        for node in [n for n in graph.nodes if is_call(n, torch.ops.tilecut.rotary.default)]:
            if (tables := _tabulated(graph, node, halves)) is not None:
                with calls_before(graph, node) as call:
                    result = _embedded(call, node, source(node), tables, bool(node.kwargs["interleaved"]))
                node.replace_all_uses_with(result)
                graph.fx.erase_node(node)
                count += 1
                continue
            if reason := self.match(node):
                graph.refusals.append(Refusal("LowerRotary", node.name, reason))
                continue
            a = arguments(node)
            interleaved = bool(a["interleaved"])
            with calls_before(graph, node) as call:
                for table in (a["cos"], a["sin"]):
                    if (table, interleaved) not in made:
                        made[table, interleaved] = call(cut_table, table, interleaved)
                if a["cos"] not in places:
                    places[a["cos"]] = call(positions, a["cos"])
                tables = (places[a["cos"]], made[a["cos"], interleaved], made[a["sin"], interleaved])
                result = _embedded(call, node, a["x"], tables, interleaved)
            node.replace_all_uses_with(result)
            graph.fx.erase_node(node)
            count += 1
        return count


def _tabulated(
    graph: Graph, node: fx.Node, halves: dict[tuple[fx.Node, bool], fx.Node]
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Positions and halved tables of an embedding by rows of constant tables; None for others."""
    read = [found for i in (1, 2) if (found := table_behind(source(node, i))) is not None]
    if _heads(node) is None or len(read) != 2 or read[0][1] is not read[1][1]:
        return None
    interleaved = bool(node.kwargs["interleaved"])
    for table, _ in read:
        half = half_of_pairs(graph.tensor(str(table.target)).detach(), interleaved)
        if half is None:
            return None
        if (table, interleaved) not in halves:
            halves[table, interleaved] = graph.add_tensor(f"{table.target}_half", half)
    return read[0][1], halves[read[0][0], interleaved], halves[read[1][0], interleaved]


def pair_chain(table: fx.Node, interleaved: bool) -> set[fx.Node] | None:
    """The calls that show that both channels of every pair of a table [.., D] hold one number; None where none do.

    They lead from the table back to where one half is put beside itself.
    """
    if is_call(table, *POINTWISE):
        chain = {table}
        for one in table.all_input_nodes:
            value = value_of(one)
            if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[-1] == 1:
                continue
            before = pair_chain(one, interleaved)
            if before is None:
                return None
            chain |= before
        return chain
    if is_call(table, *MOVING):
        x, last = source(table), value_of(table).ndim - 1
        same = isinstance(value_of(x), Tensor) and sizes_of(value_of(x))[-1:] == sizes_of(value_of(table))[-1:]
        if same and not _moves_last(table, last):
            before = pair_chain(x, interleaved)
            return None if before is None else {table, *before}
        repeated = is_call(table, aten.reshape.default, aten.flatten.using_ints) and interleaved
        if repeated and is_call(x, aten.stack.default) and _repeats(x) and value_of(x).ndim == last + 2:
            return {table, x}
        return None
    if is_call(table, aten.repeat_interleave.self_int):
        a = arguments(table)
        return {table} if interleaved and a["repeats"] == 2 and a["dim"] in (-1, value_of(table).ndim - 1) else None
    return {table} if not interleaved and is_call(table, aten.cat.default) and _repeats(table) else None


def _moves_last(node: fx.Node, last: int) -> bool:
    """Whether a call may change the order of the last dimension."""
    a = arguments(node)
    if is_call(node, aten.index.Tensor):
        return len(a["indices"]) >= value_of(source(node)).ndim
    return a.get("dim", 0) in (-1, last)


def _repeats(node: fx.Node) -> bool:
    """Whether a cat or stack along the last dimension is of one tensor and itself."""
    a = arguments(node)
    return len(a["tensors"]) == 2 and a["tensors"][0] is a["tensors"][1] and a["dim"] in (-1, value_of(node).ndim - 1)


def cut_table(table: Tensor, interleaved: bool) -> Tensor:
    """[B|1, 1, S, D] or [B|1, S, 1, D] -> [B*S or S, D/2], a number a pair."""
    width = table.shape[-1]
    half = table[..., ::2] if interleaved else table[..., : width // 2]
    return half.reshape(-1, width // 2)


def positions(table: Tensor) -> Tensor:
    """The rows of a cut table that x's places read, int64: [0], from the first on, for all rows of x, or else [B, S]."""
    if table.shape[0] == 1:
        return torch.zeros(1, dtype=torch.int64)
    batch, length = table.shape[0], table.shape[1] * table.shape[2]
    return torch.arange(batch * length).reshape(batch, length)


def _heads(node: fx.Node) -> int | None:
    """Which dimension of x the heads are, where the width is known and both tables are repeated along it."""
    x, cos, sin = (value_of(source(node, i)) for i in range(3))
    fits = sizes_of(cos) == sizes_of(sin) and isinstance(x.shape[3], int)
    return dimension_of_heads(node) if fits else None


def _embedded(
    call: Callable[..., fx.Node], node: fx.Node, x: fx.Node, tables: tuple[fx.Node, ...], interleaved: bool
) -> fx.Node:
    value, heads = value_of(x), _heads(node)
    assert heads is not None
    apart = source(x) if heads == 1 and swaps_heads(x) else None
    if apart is None and heads == 1:
        return call(ort_ops.rotary, x, *tables, interleaved)
    flat = call(aten.flatten.using_ints, apart if apart is not None else x, 2, 3)
    turned = call(ort_ops.rotary, flat, *tables, interleaved)
    split = call(aten.unflatten.int, turned, 2, [int(value.shape[heads]), int(value.shape[3])])
    return split if heads == 2 else call(aten.transpose.int, split, 1, 2)
