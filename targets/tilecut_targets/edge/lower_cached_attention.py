"""Lower `tilecut::cached_attention` to com.microsoft::GroupQueryAttention of onnxruntime's CPU provider.

Before: tilecut::cached_attention(q, k, v, past_key, past_value, past_lengths, lengths), heads apart: [B, H, S, D].
After: GroupQueryAttention on heads folded into the last dimension, with what fits of
    rotary in the op    where q and k are `tilecut::rotary` by tables of positions whose pairs share a number, and heads are a
                        multiple of 16 wide: the op has the tables, and turns what it reads
    packed              where q, k and v then are linear layers of one input, which become one layer here, or the parts of one
                        tensor in that order: the op reads them as one
Elsewhere rotary embeddings and norms of heads stay ops of their own before it, by each row's positions. A bias by distance
becomes [B, H, S, places], made once for all attentions that share its table.
Left alone, with one error: heads whose widths the op does not take (`pad_heads.py` gives them others first), and a bias
beside a soft-cap.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from tilecut_passes.add_cache import CACHED_ATTENTION
from tilecut_passes.graph import Graph, arguments, calls_before, is_call, source, swaps_heads, value_of
from tilecut_passes.tabulate_positions import half_of_pairs, table_behind
from tilecut_runtime.cache_layout import PAST_LENGTHS
from tilecut_runtime.errors import LoweringError
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.lower_attention import find_projection, joined, put_folded
from tilecut_targets.edge.pad_heads import MULTIPLE

aten = torch.ops.aten
ROTARY = torch.ops.tilecut.rotary.default
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
# Heads that the op turns are a multiple of this wide.
TURNED_MULTIPLE = 16


@dataclass(frozen=True)
class LowerCachedAttention:
    """Every attention with a cache becomes one op; `packed` where its projection can be."""

    packed: bool = True

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of attentions.

        Raises:
            LoweringError: heads of widths that the op does not take.
        """
        found = [n for n in graph.nodes if is_call(n, CACHED_ATTENTION)]
        if not found:
            return 0
        shared = _Shared(graph, *_counts(graph, found[0]))
        for node in found:
            _lower(shared, node, self.packed)
        return len(found)


@dataclass
class _Shared:
    """What the attentions of a graph share: how many tokens there are after the step, and tables of half the width."""

    graph: Graph
    seqlens: fx.Node
    total: fx.Node
    halves: dict[tuple[str, bool], fx.Node] = field(default_factory=dict)
    biases: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def half(self, table: str, interleaved: bool) -> fx.Node:
        """A table [positions, D] as [positions, D / 2], a number a pair."""
        if (table, interleaved) not in self.halves:
            half = half_of_pairs(self.graph.tensor(table).detach(), interleaved)
            assert half is not None
            self.halves[table, interleaved] = self.graph.add_tensor(f"{table}_half", half)
        return self.halves[table, interleaved]

    def bias(self, attention: fx.Node) -> fx.Node | None:
        """A table of biases by distance [H, R] as what the op adds, [B, H, S, places]; None where there is none."""
        a = arguments(attention)
        if (table := a["distance_bias"]) is None:
            return None
        if table not in self.biases:
            held = self.graph.tensor(str(table.target)).detach()
            by_distance = self.graph.add_tensor(f"{table.target}_rows", held.T.contiguous())
            with calls_before(self.graph, attention) as call:
                places = call(aten._to_copy.default, call(ort_ops.count_up, self.total, a["past_key"]), dtype=torch.int64)
                step = call(aten.arange.default, call(aten.sym_size.int, a["q"], 2))
                query = call(aten.add.Tensor, call(aten.unsqueeze.default, a["past_lengths"], 1), step)
                behind = call(aten.sub.Tensor, call(aten.unsqueeze.default, query, 2), places)
                near = call(aten.clamp.default, behind, 0, held.shape[1] - 1)
                self.biases[table] = call(aten.permute.default, call(aten.embedding.default, by_distance, near), [0, 3, 1, 2])
        return self.biases[table]


def _counts(graph: Graph, first: fx.Node) -> tuple[fx.Node, fx.Node]:
    """seqlens_k and total of the op, before the first call."""
    a = arguments(first)
    with calls_before(graph, graph.first_call()) as call:
        after = call(aten.add.Tensor, a["past_lengths"], a["lengths"])
        seqlens = call(aten._to_copy.default, call(aten.sub.Tensor, after, 1), dtype=torch.int32)
        total = call(aten._to_copy.default, call(aten.amax.default, after, [0]), dtype=torch.int32)
    return seqlens, total


def _lower(shared: _Shared, node: fx.Node, packed: bool) -> None:
    graph, a = shared.graph, arguments(node)
    widths = [int(value_of(a[name]).shape[3]) for name in "qkv"]
    if len(set(widths)) > 1 or widths[0] % MULTIPLE:
        raise LoweringError(
            "LowerCachedAttention",
            f"{node.name} has heads that the op does not take",
            got=widths,
            wanted=f"one multiple of {MULTIPLE}",
            fix="run PadHeads before AddCache",
        )
    if a["distance_bias"] is not None and a["softcap"]:
        raise LoweringError("LowerCachedAttention", f"{node.name} has a bias beside a soft-cap")
    q, k, v = a["q"], a["k"], a["v"]
    bias = shared.bias(node)
    tables = tables_of(graph, q, k)
    cos = sin = None
    if tables is not None:
        cos, sin = (shared.half(name, tables[2]) for name in tables[:2])
        q, k = source(q), source(k)
    whole = _packed(graph, node, q, k, v) if packed else None
    operands: list[fx.Node | None] = (
        [whole, None, None] if whole is not None else [_folded(graph, node, x) for x in (q, k, v)]
    )
    with calls_before(graph, node) as call:
        made = call(
            ort_ops.group_query_attention,
            *operands,
            a["past_key"],
            a["past_value"],
            shared.seqlens,
            shared.total,
            cos,
            sin,
            bias,
            int(value_of(q).shape[1]),
            int(value_of(k).shape[1]),
            a["scale"],
            a["window"],
            a["softcap"],
            bool(tables and tables[2]),
        )
        parts = [call(operator.getitem, made, i) for i in range(3)]
    for user in list(node.users):
        index = user.args[1]
        assert is_call(user, operator.getitem) and isinstance(index, int)
        if index:
            user.replace_all_uses_with(parts[index])
            graph.fx.erase_node(user)
        else:
            put_folded(graph, user, parts[0])
    graph.fx.erase_node(node)


def tables_of(graph: Graph, q: fx.Node, k: fx.Node) -> tuple[str, str, bool] | None:
    """The names of the tables by which q and k are turned at the rows' own positions, and whether neighbours are pairs.

    None where they are not, or by tables or at widths that the op does not take.
    """
    if not is_call(q, ROTARY) or not is_call(k, ROTARY) or q.args[1:3] != k.args[1:3]:
        return None
    interleaved = bool(q.kwargs["interleaved"])
    if interleaved != bool(k.kwargs["interleaved"]) or int(value_of(q).shape[3]) % TURNED_MULTIPLE:
        return None
    read = [found for i in (1, 2) if (found := table_behind(source(q, i))) is not None]
    if len(read) != 2 or not all(_are_positions(positions) for _, positions in read):
        return None
    names = [str(table.target) for table, _ in read]
    if any(half_of_pairs(graph.tensor(name).detach(), interleaved) is None for name in names):
        return None
    return names[0], names[1], interleaved


def _are_positions(node: fx.Node) -> bool:
    """Whether a node is what AddCache makes of past_lengths: past_lengths[b] + s, bounded."""
    if not is_call(node, aten.clamp.default) or not is_call(source(node), aten.add.Tensor):
        return False
    past, step = source(source(node)), source(source(node), 1)
    return (
        is_call(past, aten.unsqueeze.default)
        and source(past).op == "placeholder"
        and source(past).target == PAST_LENGTHS
        and is_call(step, aten.arange.default)
    )


def _packed(graph: Graph, node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node | None:
    """q, k and v as one tensor [B, S, (Hq + 2 Hk) * D]; None where that would have to be put together in the run."""
    if (whole := _split_of(q, k, v)) is not None:
        return whole
    parts = [p for x in (q, k, v) if (p := find_projection(graph, x)) is not None]
    if len(parts) != 3 or len({p.source for p in parts}) != 1 or not all(_read_once(x) for x in (q, k, v)):
        return None
    weight, bias = joined([(p.weight, p.bias) for p in parts])
    name = f"{node.name}_qkv"
    w = graph.add_tensor(f"{name}.weight", nn.Parameter(weight))
    b = graph.add_tensor(f"{name}.bias", nn.Parameter(bias)) if any(p.bias is not None for p in parts) else None
    with calls_before(graph, node) as call:
        return call(aten.linear.default, parts[0].source, w, b)


def _read_once(heads: fx.Node) -> bool:
    """Whether nothing else reads the layer behind heads, nor its weight: merged it would be stored and computed twice."""
    linear = source(source(heads))
    return len(linear.users) == 1 and all(len(x.users) == 1 for x in linear.all_input_nodes if x.op == "get_attr")


def _split_of(q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node | None:
    """The tensor whose parts q, k and v are, heads set apart, in that order and with nothing left over."""
    whole = None
    for i, heads in enumerate((q, k, v)):
        if not swaps_heads(heads) or not is_call(source(heads), aten.reshape.default, aten.unflatten.int):
            return None
        part = source(source(heads))
        if not is_call(part, operator.getitem) or part.args[1] != i or not is_call(source(part), *SPLITS):
            return None
        pieces, (_, heads_count, _, width) = source(part), value_of(heads).shape
        if value_of(part).ndim != 3 or value_of(part).shape[2] != heads_count * width or len(value_of(pieces)) != 3:
            return None
        if (whole := whole or source(pieces)) is not source(pieces) or arguments(pieces)["dim"] not in (-1, 2):
            return None
    return whole


def _folded(graph: Graph, node: fx.Node, heads: fx.Node) -> fx.Node:
    """[B, H, S, D] as [B, S, H*D]."""
    with calls_before(graph, node) as call:
        apart = source(heads) if swaps_heads(heads) else call(aten.transpose.int, heads, 1, 2)
        return call(aten.flatten.using_ints, apart, 2, 3)
