"""Find where an encoder may let tokens go: between its layers, on the residual stream that all of a layer comes from.

A graph whose attentions are fused is scanned in order. Where only one activation is alive, everything later comes from
it: such a node between two attentions, the last before the second of them, is the `TokenSite` after the first one's
layer. What follows the last attention in the same order of ops is the exit: the last layer's own place on the stream.
Between the first site and the exit every op must treat tokens one by one, but for attention; then a token that is
removed changes the others through the keys that they no longer see, and in no other way. Behind the exit nothing is
asked: there, removed tokens are back in their places.

Refused, with the reason: attention with an order (causal, windows, biases, ALiBi) or of some queries on other keys, ops
that mix tokens, tensors that hold something for each position, and activations of a layer that are read outside of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.infer import Axes, elementwise, infer
from tilecut_passes.axes.rules import RULES
from tilecut_passes.graph import Graph, Size, ancestors, arguments, is_call, size_of, sizes_of, symbols_of, value_of

aten = torch.ops.aten
ATTENTION = torch.ops.tilecut.attention.default
UNFUSED = (aten.scaled_dot_product_attention.default,)

# Ops that neither compute on a dimension nor mix it with another.
LAYOUTS = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.clone.default, aten.contiguous.default,
    aten.unflatten.int, aten.flatten.using_ints, aten.dropout.default, aten.alias.default, aten._to_copy.default,
    aten.to.dtype, aten.to.device, aten.type_as.default,
)  # fmt: skip


def _last(a: dict[str, Any]) -> Sequence[int]:
    return (-1,)


def _named(a: dict[str, Any]) -> Sequence[int]:
    dims = a["dim"]
    return tuple(range(value_of(a["self"]).ndim)) if dims is None else (dims,) if isinstance(dims, int) else dims


def _normalized(a: dict[str, Any]) -> Sequence[int]:
    return tuple(-1 - i for i in range(len(a["normalized_shape"])))


# Ops that work along some dimensions of their first tensor, and along which ones.
ALONG: dict[object, Callable[[dict[str, Any]], Sequence[int]]] = {
    **dict.fromkeys((aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default), _last),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _normalized),
    **dict.fromkeys(
        (
            aten.softmax.int, aten._softmax.default, aten.sum.dim_IntList, aten.mean.dim, aten.select.int, aten.slice.Tensor,
            aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.glu.default,
            aten.index_select.default,
        ),
        _named,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TokenSite:
    """A place between two layers: `stream` is the residual stream behind the layer of `attention`."""

    name: str
    attention: fx.Node
    stream: fx.Node


@dataclass(frozen=True)
class TokenStream:
    """An encoder's residual stream.

    Attributes:
        sites: between its layers, in order.
        exit: the stream behind the last layer.
        attention: that of the last layer.
        inside: what is computed between the first site and the exit, the exit included.
        token_dims: of every node inside and every stream: the dimensions that run over tokens.
        size: how many tokens there are.
    """

    sites: tuple[TokenSite, ...]
    exit: fx.Node
    attention: fx.Node
    inside: tuple[fx.Node, ...]
    token_dims: dict[fx.Node, tuple[int, ...]]
    size: Size

    def behind(self, stream: fx.Node) -> list[fx.Node]:
        """The nodes inside that come after `stream`, in order."""
        after = descendants(stream)
        return [n for n in self.inside if n in after]

    def readers(self) -> dict[fx.Node, list[fx.Node]]:
        """What reads the stream outside of the layers, by where it is read, in order."""
        inside = set(self.inside)
        places = dict.fromkeys((*(site.stream for site in self.sites), self.exit))
        return {n: [u for u in n.users if u not in inside and not _reads_size(u)] for n in places}


def find_token_sites(graph: Graph) -> TokenStream | str:
    """The first encoder's stream, or the reason why no token may be removed; the graph's attentions are fused."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    if unfused := [n for n in order if is_call(n, *UNFUSED)]:
        return f"{unfused[0].name} is not fused"
    layers, why = _layers(graph)
    if len(layers) < 2:
        return why or f"it has {len(layers)} self-attention layers: there is nothing between them"
    narrow = _narrow_places(graph, order)
    streams: list[fx.Node] = []
    for before, after in itertools.pairwise(layers):
        made = descendants(before)
        between = [n for n in narrow if order[n] < order[after] and n in made]
        if not between or after not in descendants(between[-1]):
            break
        streams.append(between[-1])
    if not streams:
        return f"between {layers[0].name} and {layers[1].name} more than the residual stream is alive"
    last = layers[len(streams)]
    leaving = _exit(narrow, order, layers[0], streams[0], last)
    if leaving is None:
        return f"what follows {last.name} is no layer like those before"
    axes = infer(graph)
    inside = nodes_between(streams[0], leaving, order)
    tokens = set(axes.of[last][2].leaves)
    dims = {n: token_dims(axes.of[n], tokens) for n in (*inside, *streams) if isinstance(value_of(n), Tensor)}
    if reason := _reason(axes, (*streams, leaving), inside, dims, tokens):
        return reason
    names = _names([(a, s) for a, s in zip(layers, streams)], order)
    sites = tuple(TokenSite(name, a, s) for name, a, s in zip(names, layers, streams))
    return TokenStream(sites, leaving, last, tuple(inside), dims, sizes_of(value_of(last))[2])


def token_dims(types: Any, tokens: set[Axis]) -> tuple[int, ...]:
    """The dimensions of a tensor that hold tokens."""
    if types is None or any(not isinstance(axis, Axis) for axis in types):
        return ()
    return tuple(d for d, axis in enumerate(types) if not tokens.isdisjoint(axis.leaves))


def descendants(node: fx.Node) -> set[fx.Node]:
    """What is computed from a node's value, itself left out."""
    found: set[fx.Node] = set()
    todo = list(node.users)
    while todo:
        one = todo.pop()
        if one not in found and one.op != "output":
            found.add(one)
            todo += one.users
    return found


def _layers(graph: Graph) -> tuple[list[fx.Node], str]:
    """The first run of attentions that tokens may leave between, and why another one is none."""
    run: list[fx.Node] = []
    why = ""
    for node in graph.nodes:
        if not is_call(node, ATTENTION):
            continue
        reason = _ordered(node)
        if reason is None:
            run.append(node)
        elif len(run) > 1:
            break
        else:
            run, why = [], why or reason
    return run, why


def _ordered(node: fx.Node) -> str | None:
    """Why an attention needs all of its tokens where they are, or None."""
    a = arguments(node)
    q, k = (sizes_of(value_of(a[name])) for name in ("q", "k"))
    if a["causal"] != "none":
        return f"{node.name} is causal: its tokens are no set"
    if max(a["window"]) >= 0 or a["global_tokens"]:
        return f"{node.name} sees a window of positions"
    if a["bias"] is not None or a["alibi_slopes"] is not None:
        return f"{node.name} has a bias for pairs of positions"
    if q[2] != k[2]:
        return f"{node.name} has {q[2]} queries on {k[2]} keys"
    if q[1] != k[1]:
        return f"{node.name} has {q[1]} heads on {k[1]} KV groups"
    if a["softcap"] or a["dropout_p"]:
        return f"{node.name} has a soft-cap or dropout"
    return None


def _narrow_places(graph: Graph, order: dict[fx.Node, int]) -> list[fx.Node]:
    """The activations beside which no other one is alive: all that comes later comes from them."""
    from_input: set[fx.Node] = set()
    from_weight: set[fx.Node] = set()
    activations: list[fx.Node] = []
    for node in order:
        value = value_of(node)
        if not isinstance(value, Tensor | tuple | list):
            continue
        if node.op == "placeholder" or not from_input.isdisjoint(node.all_input_nodes):
            from_input.add(node)
        is_weight = node.op == "get_attr" and isinstance(graph.tensor(str(node.target)), nn.Parameter)
        floats = node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point()
        if is_weight or floats or not from_weight.isdisjoint(node.all_input_nodes):
            from_weight.add(node)
        if node in from_input and node in from_weight:
            activations.append(node)
    last_read = {
        n: max((order[u] for u in n.users if u.op != "output" and not _reads_size(u)), default=-1) for n in activations
    }
    found = []
    furthest = -1
    for node in activations:
        if furthest <= order[node]:
            found.append(node)
        furthest = max(furthest, last_read[node])
    return found


def _reads_size(user: fx.Node) -> bool:
    return user.op != "output" and not isinstance(value_of(user), Tensor | tuple | list)


def _exit(
    narrow: Sequence[fx.Node], order: dict[fx.Node, int], first: fx.Node, stream: fx.Node, last: fx.Node
) -> fx.Node | None:
    """Where the last layer ends: as many narrow places behind its attention as there are in the first layer, alike."""
    made, made_last = descendants(first), descendants(last)
    pattern = [n.target for n in narrow if order[n] <= order[stream] and n in made]
    following = [n for n in narrow if n in made_last][: len(pattern)]
    if [n.target for n in following] != pattern:
        return None
    if sizes_of(value_of(following[-1])) != sizes_of(value_of(stream)):
        return None
    return following[-1]


def nodes_between(stream: fx.Node, leaving: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """What is computed from `stream` and leads to `leaving`, in order."""
    return sorted(descendants(stream) & ancestors([leaving]), key=order.__getitem__)


def _reason(
    axes: Axes,
    streams: Sequence[fx.Node],
    inside: Sequence[fx.Node],
    dims: dict[fx.Node, tuple[int, ...]],
    tokens: set[Axis],
) -> str | None:
    """Why tokens cannot be removed from these nodes, or None."""
    within, size = set(inside), sizes_of(value_of(streams[0]))
    borders = {(b.user, b.source): b.axes for b in axes.borders}
    if mixing := [reason for node in inside if (reason := mixes(node, dims))]:
        return mixing[0]
    for stream in streams:
        if value_of(stream).ndim != 3 or dims[stream] not in ((0,), (1,)):
            return f"{stream.name} is {size}, and its tokens are no dimension of three"
    for node in inside:
        for one in node.all_input_nodes:
            if one in within or one in streams or not isinstance(value_of(one), Tensor):
                continue
            if is_call(node, ATTENTION) and one is arguments(node)["key_padding"]:
                continue
            types = borders.get((node, one), axes.of.get(one))
            if token_dims(types, tokens) or _as_long(value_of(one), streams[0], dims):
                return f"{node.name} reads {one.name}, which holds something for each position"
        outside = [u.name for u in node.users if u not in within and not _reads_size(u)]
        if outside and node not in streams:
            return f"{outside[0]} reads {node.name}, which lies within a layer"
    return None


def _as_long(value: Tensor, stream: fx.Node, dims: dict[fx.Node, tuple[int, ...]]) -> bool:
    """Whether a tensor has a dynamic size that counts tokens."""
    size = size_of(value_of(stream).shape[dims[stream][0]])
    return any(symbols_of(size) & symbols_of(s) for s in sizes_of(value)) if symbols_of(size) else False


def mixes(node: fx.Node, dims: dict[fx.Node, tuple[int, ...]]) -> str | None:
    """Why an op may mix tokens, or None where it treats each alone."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload) or is_call(node, ATTENTION, *LAYOUTS):
        return None
    if torch.Tag.pointwise in op.tags or RULES.get(op) is elementwise or op is aten.sym_size.int:
        return None
    if op not in ALONG:
        return f"{node.name} ({op}) may mix tokens"
    a = arguments(node)
    operand = a.get("mat1") or a.get("self") or a["input"]
    assert isinstance(operand, fx.Node)
    rank = value_of(operand).ndim
    if {d % rank for d in ALONG[op](a)} & set(dims.get(operand, ())):
        return f"{node.name} ({op}) works along the tokens"
    return None


def _names(layers: Iterable[tuple[fx.Node, fx.Node]], order: dict[fx.Node, int]) -> list[str]:
    """The module path that all weights of a layer share, numbered where that is none or another layer's too."""
    found = []
    for attention, stream in layers:
        nodes = nodes_between(attention, stream, order)
        read = [str(x.target).split(".") for n in nodes for x in n.all_input_nodes if x.op == "get_attr"]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*read))
        found.append(".".join(parts[0] for parts in shared))
    return [name if name and found.count(name) == 1 else f"{name or 'layer'}#{i}" for i, name in enumerate(found)]
