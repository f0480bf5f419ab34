"""Turn a decoder's graph over whole texts into one that goes on from a key-value cache: prefill and decoding in one graph.

Before: logits [B, S, V] of tokens [B, S], attentions fused to causal `tilecut::attention` of a text on itself, padding told
by a mask [B, S] or not at all.
After:
    tokens [B, S], past_lengths [B], lengths [B], for every attention past key and value [B, Hk, capacity, D or E]
    (of an encoder-decoder also what `split_encoder.py` made its encoder give: cross.*)
    -> logits [B, 1, V] of each row's token lengths[b] - 1, and present keys and values, shaped like the past ones
Rows are padded on the right, and row b's token s stands at position past_lengths[b] + s. Every attention becomes a
`tilecut::cached_attention`; windows look back over the cache, biases for pairs of positions are told by distance
(`distance_bias.py`), and attention on an encoder's keys stays as it is; the mask is gone. What the graph computes from
positions is read from tables (`tabulate_positions.py`), and logits are made for one token a row (`keep_last_token.py`).
Each attention has the heads and widths that pruning left it, and one that was removed has no cache. `graph.states` says
which output continues which input; `graph.ranges` how many places a cache may have.

Refused, with one error that names the node: attention that is not causal, that has global tokens or a bias that distances
do not tell, or whose keys come from elsewhere; ops that mix tokens otherwise; inputs other than tokens and their mask; a
fixed length; a graph that was captured with a cache.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from tilecut_passes.distance_bias import distance_table
from tilecut_passes.find_token_sites import mixes
from tilecut_passes.graph import (
    Graph,
    ancestors,
    arguments,
    calls_before,
    is_call,
    read_sizes_off,
    sizes_of,
    source,
    symbols_of,
    value_of,
)
from tilecut_passes.keep_last_token import keep_last_token
from tilecut_passes.routed_regions import routed_regions
from tilecut_passes.tabulate_positions import ROTARY, TabulatePositions, reached_by

# Importing it registers tilecut::cached_attention.
from tilecut_runtime import cached_attention as _cached_attention_op
from tilecut_runtime.cache_layout import CROSS, LENGTHS, PAST_LENGTHS, past_name, present_name
from tilecut_runtime.errors import LoweringError
from tilecut_runtime.manifest import DimRange

aten = torch.ops.aten
assert _cached_attention_op
ATTENTION = torch.ops.tilecut.attention.default
CACHED_ATTENTION = torch.ops.tilecut.cached_attention.default
CAPACITY = "capacity"
# Tables of a model that names no limit of its own, or an enormous one, have so many positions.
UNBOUNDED, LONGEST = 4096, 32768
WHERE = "AddCache"


@dataclass(frozen=True)
class AddCache:
    """Prefill and decoding in one graph; caches have at most `max_length` places, None: as many as the model has positions."""

    max_length: int | None = None

    def __call__(self, graph: Graph) -> int:
        """Rewrite in place; returns the number of attentions.

        Raises:
            LoweringError: the graph is no decoder that a cache can stand for.
        """
        if any(is_call(n, CACHED_ATTENTION) for n in graph.nodes):
            return 0
        if graph.states:
            name = next(iter(graph.states))
            raise LoweringError(
                WHERE,
                f"the model was captured with a cache of its own, {name}",
                fix="leave it out of the example inputs",
            )
        tokens, mask = find_tokens(graph)
        batch, length = _symbols(graph, tokens)
        reached = reached_by([tokens])
        attentions, across = _sort_attentions(graph, reached)
        output = _output_of_logits(graph)
        routed = routed_regions(graph, reached, batch, length)
        _check(graph, length, reached - routed, attentions, across)
        name = graph.dims[length]
        longest = self._longest(graph, name)
        graph.ranges[name] = DimRange(1, longest)
        past_lengths, lengths = (
            placeholder(graph, name, value_of(tokens).shape[:1], torch.int64) for name in (PAST_LENGTHS, LENGTHS)
        )
        capacity = _new_size(graph, CAPACITY, longest)
        tables = TabulatePositions(
            graph, _positions(graph, tokens, past_lengths, longest), mask, batch, length, longest
        )
        _check_paddings(tables, attentions)
        biases = _Biases(tables)
        told = [biases(node) for node in attentions]
        # What attention reads of positions is the padding and the biases that were just looked at; where tokens are routed,
        # numbers of rows are counted.
        tables(reached, apart=routed.union(attentions))
        presents: list[tuple[str, fx.Node]] = []
        for i, node in enumerate(attentions):
            presents += _cache(graph, node, i, capacity, past_lengths, lengths, told[i])
        result = keep_last_token(graph, graph.results[output], tokens, lengths)
        read_sizes_off(graph, [tokens])
        graph.fx.output_node().args = ((result, *(node for _, node in presents)),)
        graph.outputs = (graph.outputs[output], *(name for name, _ in presents))
        graph.returns = "mapping"
        if mask is not None:
            _drop_mask(graph, mask)
        return len(attentions)

    def _longest(self, graph: Graph, length: str) -> int:
        most = graph.ranges[length].max
        if self.max_length is None:
            return UNBOUNDED if most is None else min(most, LONGEST)
        if most is not None and self.max_length > most:
            raise LoweringError(
                WHERE, "the model has fewer positions", got=f"max_length={self.max_length}", wanted=f"at most {most}"
            )
        return self.max_length


def find_tokens(graph: Graph) -> tuple[fx.Node, str | None]:
    """The input of token ids [B, S], and the name of the mask of real tokens, None where there is none."""
    found: list[str] = []
    mask = None
    for name, node in zip(graph.inputs, graph.placeholders, strict=True):
        if name.startswith(CROSS):
            continue
        value = value_of(node)
        if value.ndim != 2 or value.is_floating_point():
            raise LoweringError(
                WHERE,
                f"the input {name} is neither token ids nor their mask",
                got=str(graph.input_specs()[graph.inputs.index(name)]),
                wanted="integers [batch, sequence]",
                fix="leave it out of the example inputs",
            )
        if "mask" in name and mask is None:
            mask = name
        else:
            found.append(name)
    if len(found) != 1:
        raise LoweringError(
            WHERE,
            "the model has no one input of token ids",
            got=", ".join(found) or "none",
            wanted="one, and a mask at most",
            fix="leave the others out of the example inputs",
        )
    node = graph.input_node(found[0])
    assert node is not None
    return node, mask


def _symbols(graph: Graph, tokens: fx.Node) -> tuple[sympy.Symbol, sympy.Symbol]:
    """The symbols of the batch and of the length."""
    found = []
    for what, size in zip(("batch", "length"), sizes_of(value_of(tokens))):
        limits = None if not isinstance(size, sympy.Symbol) else graph.ranges[graph.dims[size]]
        if limits is None or limits.min > 1:
            got = size if limits is None else f"at least {limits.min}"
            raise LoweringError(
                WHERE,
                f"the {what} of {tokens.name} is not dynamic",
                got=got,
                wanted="any from 1 on",
                fix="pass dynamic_shapes, or none",
            )
        found.append(size)
    return found[0], found[1]


def _sort_attentions(graph: Graph, reached: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The attentions of the tokens on themselves, and those on what an encoder gave."""
    given = reached_by([n for name, n in zip(graph.inputs, graph.placeholders, strict=True) if name.startswith(CROSS)])
    found = [n for n in graph.nodes if is_call(n, ATTENTION)]
    across = [n for n in found if all(arguments(n)[part] in given - reached for part in "kv")]
    return [n for n in found if n not in across], across


def _output_of_logits(graph: Graph) -> int:
    """Which output holds the logits: the only one, or the one of that name."""
    if len(graph.outputs) == 1:
        return 0
    if "logits" not in graph.outputs:
        raise LoweringError(WHERE, "none of several outputs is called logits", got=", ".join(graph.outputs))
    return graph.outputs.index("logits")


def _check(
    graph: Graph,
    length: sympy.Symbol,
    reached: set[fx.Node],
    attentions: Sequence[fx.Node],
    across: Sequence[fx.Node],
) -> None:
    """Refuse what a cache cannot stand for."""
    dims = {n: _places(value_of(n), length) for n in reached if isinstance(value_of(n), Tensor)}
    for node in graph.nodes:
        if node not in reached:
            continue
        if node in attentions:
            reason = _unfit(node, reached)
        else:
            reason = _unfit_across(node, reached) if node in across else _mixing(node, dims, length)
        if reason is not None:
            behind = {one.name for one in ancestors([node]) if one not in reached or one is node}
            refused = [r.why for r in graph.refusals if r.node in behind]
            raise LoweringError(
                WHERE,
                f"{node.name}: {reason}",
                got="; ".join(refused) or None,
                wanted="causal attention, and ops that treat tokens one by one",
            )
    if not attentions:
        raise LoweringError(
            WHERE, "the graph has no attention", wanted="causal self-attention of the token ids' own positions"
        )


def _places(value: Tensor, length: sympy.Symbol) -> tuple[int, ...]:
    """The dimensions of a tensor that hold positions."""
    return tuple(d for d, size in enumerate(sizes_of(value)) if length in symbols_of(size))


def _mixing(node: fx.Node, dims: dict[fx.Node, tuple[int, ...]], length: sympy.Symbol) -> str | None:
    """Why an op may mix tokens, or None."""
    if is_call(node, ROTARY, aten.embedding.default) or node.op != "call_function":
        return None
    if is_call(node, aten.index.Tensor) and source(node).op == "get_attr" and len(arguments(node)["indices"]) == 1:
        # Words of a cut vocabulary are numbered anew.
        return None
    if is_call(node, aten.cat.default, aten.stack.default):
        dim = int(arguments(node)["dim"]) % value_of(node).ndim
        return None if dim not in dims[node] else f"{node.target} works along the tokens"
    if is_call(node, aten.constant_pad_nd.default):
        rank = value_of(node).ndim
        padded = {rank - 1 - i // 2 for i, n in enumerate(arguments(node)["pad"]) if n}
        return f"{node.target} pads the tokens" if padded & set(dims[node]) else None
    if (reason := mixes(node, dims)) is not None:
        return reason.removeprefix(f"{node.name} ")
    value = value_of(node)
    for size in sizes_of(value) if isinstance(value, Tensor) else ():
        if length in symbols_of(size) and length in symbols_of(cast(sympy.Expr, sympy.simplify(size / length))):
            return f"{node.target} takes the tokens apart: one of its sizes is {size}"
    return None


def _unfit(node: fx.Node, reached: set[fx.Node]) -> str | None:
    """Why an attention cannot have a cache, or None."""
    a = arguments(node)
    q, k = (sizes_of(value_of(a[name])) for name in ("q", "k"))
    if any(a[name] in reached for name in ("bias", "alibi_slopes")):
        return "this attention has a bias that depends on the token ids"
    if a["causal"] == "none":
        return "this attention is not causal"
    if q[2] != k[2] or any(a[name] not in reached for name in "qkv"):
        return f"this attention has {q[2]} queries on {k[2]} keys that are not its own tokens"
    if a["global_tokens"] or a["dropout_p"]:
        return "this attention has global tokens or dropout"
    if a["key_padding"] is not None and a["key_padding"] in reached:
        return "this attention hides keys by what the token ids are"
    return None


def _unfit_across(node: fx.Node, reached: set[fx.Node]) -> str | None:
    """Why an attention on an encoder's keys cannot stay as it is, or None."""
    a = arguments(node)
    if a["causal"] != "none" or max(a["window"]) >= 0:
        return "this attention on the encoder's keys sees some of them by their place"
    if a["bias"] is not None or a["alibi_slopes"] is not None:
        return "this attention on the encoder's keys has a bias for pairs of positions"
    return "this attention has dropout" if a["dropout_p"] else None


def _check_paddings(tables: TabulatePositions, attentions: Sequence[fx.Node]) -> None:
    """Real tokens are seen by every attention."""
    for node in {arguments(n)["key_padding"] for n in attentions} - {None}:
        if not bool(tables.value(node, min(7, tables.longest)).all()):
            raise LoweringError(WHERE, f"{node.name} hides keys that the mask says are real")


@dataclass
class _Biases:
    """The tables of biases by distance; attentions with equal ones share it."""

    tables: TabulatePositions
    known: dict[tuple[fx.Node | None, ...], fx.Node | None] = field(default_factory=dict)

    def __call__(self, attention: fx.Node) -> fx.Node | None:
        """The tensor [Hq, R] of an attention, None where it has no bias."""
        a = arguments(attention)
        key = a["bias"], a["alibi_slopes"]
        if key not in self.known:
            table = distance_table(self.tables, attention)
            name = f"{attention.name}_distance_bias"
            self.known[key] = None if table is None else self.tables.hold(table, name)
        return self.known[key]


def placeholder(graph: Graph, name: str, sizes: Sequence[int | torch.SymInt], dtype: torch.dtype) -> fx.Node:
    """A new input of these sizes behind the others."""
    with graph.fake_mode():
        value = torch.empty(tuple(sizes), dtype=dtype)
    return graph.add_input(name, value)


def _new_size(graph: Graph, name: str, longest: int) -> torch.SymInt:
    """A new dynamic size, called `name`, of at most `longest`."""
    shapes = graph.fake_mode().shape_env
    assert shapes is not None
    source, hint = ConstantSource(name), min(longest, 17)
    symbol = shapes.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    made = cast(torch.SymInt, shapes.create_symintnode(symbol, hint=hint, source=source))
    graph.dims[cast(sympy.Symbol, symbol)] = name
    graph.ranges[name] = DimRange(1, longest)
    return made


def _positions(graph: Graph, tokens: fx.Node, past_lengths: fx.Node, longest: int) -> fx.Node:
    """Where every token stands, int64 [B, S]; padding stands at the last position at most."""
    with calls_before(graph, graph.first_call()) as call:
        step = call(aten.arange.default, call(aten.sym_size.int, tokens, 1))
        places = call(aten.add.Tensor, call(aten.unsqueeze.default, past_lengths, 1), step)
        return call(aten.clamp.default, places, None, longest - 1)


def _cache(
    graph: Graph,
    node: fx.Node,
    index: int,
    capacity: torch.SymInt,
    past_lengths: fx.Node,
    lengths: fx.Node,
    distance_bias: fx.Node | None,
) -> list[tuple[str, fx.Node]]:
    """Put the op with a cache in the place of an attention; returns the outputs that continue it, with their names."""
    a = arguments(node)
    pasts = []
    for part, name in (("key", "k"), ("value", "v")):
        value = value_of(a[name])
        sizes = (*value.shape[:2], capacity, value.shape[3])
        past = placeholder(graph, past_name(index, part), sizes, value.dtype)
        graph.states[past_name(index, part)] = present_name(index, part)
        pasts.append(past)
    with calls_before(graph, node) as call:
        made = call(
            CACHED_ATTENTION,
            *(a[name] for name in "qkv"),
            *pasts,
            past_lengths,
            lengths,
            distance_bias,
            scale=a["scale"],
            window=a["window"][0],
            softcap=a["softcap"],
        )
        out, *presents = (call(operator.getitem, made, i) for i in range(3))
    node.replace_all_uses_with(out)
    graph.fx.erase_node(node)
    return [(present_name(index, part), one) for part, one in zip(("key", "value"), presents)]


def _drop_mask(graph: Graph, mask: str) -> None:
    """Remove the input, and what was only computed from it."""
    node = graph.input_node(mask)
    assert node is not None
    graph.remove_dead_code()
    if node.users:
        raise LoweringError(WHERE, f"{next(iter(node.users)).name} reads {mask} in a way that no position stands for")
    graph.remove_input(node)
