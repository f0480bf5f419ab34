"""Split an encoder-decoder's graph into what runs once for an input, and what runs for every token.

Before: one graph of the encoder's inputs and the decoder's tokens [B, S], attentions fused: causal ones of the tokens on
themselves, and others of the tokens on keys [B, Hk, T, D] and values that come from the encoder (cross-attention).
After, two graphs:
    encoder    the encoder's inputs -> cross.<i>.key, cross.<i>.value of the i-th cross-attention, and what else the decoder
               reads of the encoder: cross.mask, the keys that may be seen (cross.mask.<j> of several), cross.<j> for the rest
    decoder    tokens, a mask of them where the model has one, and all cross.* -> what depends on the tokens
What the decoder computes from its own positions stays with it. Outputs that no token reaches, such as the encoder's last
hidden states, are dropped. Refused, with one error: an encoder whose inputs have the decoder's length, or one that gives
keys of a length that it computes (strided convolutions over a dynamic length).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from tilecut_passes.graph import Graph, arguments, is_call, read_sizes_off, sizes_of, symbols_of, value_of
from tilecut_passes.tabulate_positions import reached_by, reads_values
from tilecut_runtime.cache_layout import CROSS
from tilecut_runtime.errors import LoweringError

ATTENTION = torch.ops.tilecut.attention.default
WHERE = "SplitEncoder"


def split_encoder(graph: Graph) -> tuple[Graph, Graph] | None:
    """The encoder and the decoder of a graph, which is left as it is; None where it is no encoder-decoder.

    Raises:
        LoweringError: sizes by which the two cannot be called apart.
    """
    found = [node for node in graph.placeholders if _is_read_across(node)]
    if len(found) != 1:
        return None
    tokens = found[0]
    reached = reached_by([tokens])
    read = [arguments(n)[part] for n in _across(graph, reached) for part in "kv"]
    # What the decoder's keys and values are not made of is the decoder's own: a mask of its tokens.
    others = [n for n in graph.placeholders if n is not tokens and reached_by([n]).intersection(read)]
    own = {n for n in graph.placeholders if n not in others}
    encoded = reached_by(others)
    crossing = [
        node
        for node in graph.nodes
        if node in encoded and node not in reached and any(u in reached and reads_values(u, node) for u in node.users)
    ]
    _check_sizes(graph, tokens, others, crossing)
    names = _names(graph, crossing, reached)
    return _encoder(graph, own, crossing, names), _decoder(graph, tokens, others, names)


def _is_read_across(tokens: fx.Node) -> bool:
    """Whether an input is the tokens [B, S] of a decoder that looks at something else too."""
    value = value_of(tokens)
    if value.ndim != 2 or value.is_floating_point():
        return False
    reached = reached_by([tokens])
    causal = [n for n in tokens.graph.nodes if is_call(n, ATTENTION) and arguments(n)["causal"] != "none"]
    # What an encoder reads, and masks, reach the decoder's later layers, and not its first.
    first = bool(causal) and all(arguments(n)[part] in reached for n in causal for part in "qkv")
    return first and bool(_across(tokens.graph, reached))


def _across(graph: Graph | fx.Graph, reached: set[fx.Node]) -> list[fx.Node]:
    """The attentions of tokens that reach `reached` on something else."""
    found = [n for n in graph.nodes if is_call(n, ATTENTION) and arguments(n)["q"] in reached]
    return [n for n in found if not any(arguments(n)[part] in reached for part in "kv")]


def _check_sizes(graph: Graph, tokens: fx.Node, others: Sequence[fx.Node], crossing: Sequence[fx.Node]) -> None:
    """Refuse sizes by which the two graphs cannot be called apart."""
    names = dict(zip(graph.placeholders, graph.inputs, strict=True))
    length = sizes_of(value_of(tokens))[1]
    for node in others:
        if not isinstance(length, int) and length in sizes_of(value_of(node)):
            raise LoweringError(
                WHERE,
                f"{names[node]}, which the encoder reads, has the length of {names[tokens]}",
                got=next(name for symbol, name in graph.dims.items() if symbol == length),
                wanted="a length of its own",
                fix="name the two lengths apart in dynamic_shapes, and give examples of two lengths",
            )
    for node in crossing:
        for size in sizes_of(value_of(node)):
            if not isinstance(size, int) and size not in graph.dims:
                raise LoweringError(
                    WHERE,
                    f"{node.name}, which the decoder reads of the encoder, has a length that the encoder computes",
                    got=size,
                    wanted="the length of one of its inputs, or a fixed one",
                    fix="give the encoder's inputs a fixed length",
                )


def _names(graph: Graph, crossing: Sequence[fx.Node], reached: set[fx.Node]) -> dict[fx.Node, str]:
    """What each tensor that crosses is called."""
    names: dict[fx.Node, str] = {}
    across = _across(graph, reached)
    for i, node in enumerate(across):
        for part, operand in (("key", "k"), ("value", "v")):
            names.setdefault(arguments(node)[operand], f"{CROSS}{i}.{part}")
    masks = list(dict.fromkeys(m for n in across if (m := arguments(n)["key_padding"]) in crossing))
    for j, mask in enumerate(masks):
        names.setdefault(mask, f"{CROSS}mask" if len(masks) == 1 else f"{CROSS}mask.{j}")
    rest = [n for n in crossing if n not in names]
    return {n: names.get(n) or f"{CROSS}{len(across) + rest.index(n)}" for n in crossing}


def _encoder(graph: Graph, own: set[fx.Node], crossing: Sequence[fx.Node], names: dict[fx.Node, str]) -> Graph:
    made = graph.copy()
    at = dict(zip(graph.nodes, made.nodes, strict=True))
    made.fx.output_node().args = (tuple(at[n] for n in crossing),)
    made.outputs, made.returns = tuple(names[n] for n in crossing), "mapping"
    _drop_inputs(made, {at[n] for n in own})
    return made


def _decoder(graph: Graph, tokens: fx.Node, others: Sequence[fx.Node], names: dict[fx.Node, str]) -> Graph:
    made = graph.copy()
    at = dict(zip(graph.nodes, made.nodes, strict=True))
    reached = reached_by([at[tokens]])
    kept = [(name, node) for name, node in zip(made.outputs, made.results, strict=True) if node in reached]
    made.outputs = tuple(name for name, _ in kept)
    made.fx.output_node().args = (tuple(node for _, node in kept),)
    apart = {at[n] for n in others}
    for old, name in names.items():
        at[old].replace_all_uses_with(made.add_input(name, value_of(old)))
    _drop_inputs(made, apart)
    return made


def _drop_inputs(graph: Graph, apart: set[fx.Node]) -> None:
    """Remove inputs, whose sizes other inputs tell, and sizes that no input has any more."""
    graph.remove_dead_code()
    read_sizes_off(graph, [n for n in graph.placeholders if n not in apart])
    graph.remove_dead_code()
    for node in apart:
        # What still reads one would be a mistake here: fx refuses.
        graph.remove_input(node)
    used = {symbol for n in graph.placeholders for size in sizes_of(value_of(n)) for symbol in symbols_of(size)}
    graph.dims = {symbol: name for symbol, name in graph.dims.items() if symbol in used}
    graph.ranges = {name: limits for name, limits in graph.ranges.items() if name in graph.dims.values()}
    graph.clean()
