"""Let a cache grow by concatenation, for runtimes that hold it themselves.

Before (`add_cache.py`):
    tokens [B, S], past_lengths [B], lengths [B], past key and value [B, Hk, capacity, D or E] -> logits [B, 1, V], present
After:
    tokens [B, S], attention_mask int64 [B, P + S], position_ids int64 [B, S], beam_idx int32 [B], past [B, Hk, P, D or E]
    -> logits [B, 1, V] of the last column, present [B, Hk, P + S, D or E]
Rows are padded on the left, in the cache too: the mask says which columns are real, past ones first; what padding gives is no
one's to read. `beam_idx` says which row of the past each row continues. These are the names of optimum-intel's and OpenVINO
GenAI's models. Every `tilecut::cached_attention` becomes a `tilecut::attention` of the tokens on the concatenated cache.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.add_cache import CACHED_ATTENTION, CAPACITY, placeholder
from tilecut_passes.graph import Graph, arguments, calls_before, is_call, source, value_of
from tilecut_runtime.cache_layout import BEAMS, LENGTHS, MASK, PAST_LENGTHS, POSITIONS
from tilecut_runtime.manifest import DimRange

aten = torch.ops.aten
ATTENTION = torch.ops.tilecut.attention.default


@dataclass(frozen=True)
class GrowCache:
    """Every attention with a cache concatenates what it reads."""

    def __call__(self, graph: Graph) -> int:
        """Rewrite in place; returns the number of attentions."""
        found = [n for n in graph.nodes if is_call(n, CACHED_ATTENTION)]
        if not found:
            return 0
        past_lengths, lengths = (graph.input_node(name) for name in (PAST_LENGTHS, LENGTHS))
        assert past_lengths is not None and lengths is not None
        tokens = graph.placeholders[0]
        batch, length = value_of(tokens).shape
        past = arguments(found[0])["past_key"]
        total = value_of(past).shape[2] + length
        mask = placeholder(graph, MASK, (batch, total), torch.int64)
        positions = placeholder(graph, POSITIONS, (batch, length), torch.int64)
        beams = placeholder(graph, BEAMS, (batch,), torch.int32)
        _place_tokens(past_lengths, positions)
        _take_last_column(graph, lengths, tokens)
        with calls_before(graph, graph.first_call()) as call:
            real = call(aten.ne.Scalar, mask, 0)
        biases: dict[fx.Node, fx.Node] = {}
        for node in found:
            _concatenate(graph, node, real, beams, biases)
        graph.remove_dead_code()
        for node in (past_lengths, lengths):
            graph.remove_input(node)
        limits = graph.ranges[CAPACITY]
        graph.ranges[CAPACITY] = DimRange(0, limits.max)
        return len(found)


def _place_tokens(past_lengths: fx.Node, positions: fx.Node) -> None:
    """Positions are given, and not counted from past_lengths."""
    for row in [u for u in past_lengths.users if is_call(u, aten.unsqueeze.default)]:
        for counted in [u for u in row.users if is_call(u, aten.add.Tensor)]:
            counted.replace_all_uses_with(positions)


def _take_last_column(graph: Graph, lengths: fx.Node, tokens: fx.Node) -> None:
    """The last real token of every row stands in the last column (`keep_last_token.py` reads it at lengths - 1)."""
    for before in [u for u in lengths.users if is_call(u, aten.sub.Tensor)]:
        for last in [u for u in before.users if is_call(u, aten.clamp.default)]:
            for place in [u for u in last.users if is_call(u, aten.add.Tensor)]:
                with calls_before(graph, place) as call:
                    end = call(operator.sub, call(aten.sym_size.int, tokens, 1), 1)
                    place.replace_all_uses_with(call(aten.add.Tensor, source(place), end))


def _concatenate(graph: Graph, node: fx.Node, real: fx.Node, beams: fx.Node, biases: dict[fx.Node, fx.Node]) -> None:
    a = arguments(node)
    with calls_before(graph, node) as call:
        keys, values = (
            call(aten.cat.default, [call(aten.index_select.default, a[f"past_{part}"], 0, beams), a[name]], 2)
            for part, name in (("key", "k"), ("value", "v"))
        )
        table = a["distance_bias"]
        if table is not None and table not in biases:
            biases[table] = _bias(call, table, a["past_key"], a["q"])
        out = call(
            ATTENTION,
            a["q"],
            keys,
            values,
            real,
            None if table is None else biases[table],
            None,
            scale=a["scale"],
            causal="bottom_right",
            window=[a["window"], -1],
            global_tokens=0,
            softcap=a["softcap"],
            dropout_p=0.0,
        )
    for user in list(node.users):
        index = user.args[1]
        assert is_call(user, operator.getitem) and isinstance(index, int)
        user.replace_all_uses_with((out, keys, values)[index])
        graph.fx.erase_node(user)
    graph.fx.erase_node(node)


def _bias(call, table: fx.Node, past: fx.Node, q: fx.Node) -> fx.Node:
    """A table of biases by distance [H, R] as [1, H, S, P + S]."""
    before, new = call(aten.sym_size.int, past, 2), call(aten.sym_size.int, q, 2)
    key = call(aten.arange.default, call(operator.add, before, new))
    query = call(aten.add.Tensor, call(aten.arange.default, new), before)
    behind = call(aten.sub.Tensor, call(aten.unsqueeze.default, query, 1), key)
    near = call(aten.clamp.default, behind, 0, int(value_of(table).shape[1]) - 1)
    rows = call(aten.embedding.default, call(aten.transpose.int, table, 0, 1), near)
    return call(aten.unsqueeze.default, call(aten.permute.default, rows, [2, 0, 1]), 0)
