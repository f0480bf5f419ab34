"""Remove tokens between an encoder's layers: one of the two interpretations of a plan's `tokens`; `mask_tokens` is the other.

Before: a graph whose attentions are fused, with residual stream h [B, S, H] behind every layer. After, for every entry of
the plan: the tokens that the layer's attention looks at most are gathered, and what follows computes with k of them, key
padding gathered alike. Behind the last layer (and wherever the stream is an output) the removed places are filled again, so
that outputs keep their shapes: with the mean of the real tokens that stayed, or with the state with which each left (the
drop-and-restore of arXiv 2010.07003).
A row with fewer real tokens than k keeps them all, and some padding, which stays hidden. Left alone: entries of 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.axes.rules_views import set_argument
from tilecut_passes.find_token_sites import ATTENTION, TokenSite, TokenStream, find_token_sites
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import (
    Graph,
    arguments,
    calls_before,
    is_call,
    size_arguments,
    size_of,
    sizes_of,
    source,
    value_of,
)
from tilecut_passes.run_passes import Pass
from tilecut_passes.select_tokens import Count, count_kept, mean_of_real, select_tokens, write_out
from tilecut_passes.token_plan import MEAN, TokenPlan, check_schedule
from tilecut_runtime.errors import PlanError

aten = torch.ops.aten

# Ops whose arguments name sizes, and what the argument is called.
RESHAPES: dict[object, str] = {
    aten.reshape.default: "shape",
    aten.view.default: "size",
    aten._unsafe_view.default: "size",
    aten.expand.default: "size",
    aten.unflatten.int: "sizes",
}


@dataclass(frozen=True)
class PruneTokens:
    """Apply a plan's `tokens` by gathering. Not idempotent: what is cut has other sites."""

    tokens: tuple[TokenPlan, ...]

    def __call__(self, graph: Graph) -> int:
        """Cut the graph in place; returns how often tokens go.

        Raises:
            PlanError: the model has no such place, or a fraction is none.
        """
        stream, chosen = find_chosen(graph, self.tokens)
        if not chosen:
            return 0
        readers = stream.readers()
        first = chosen[0][0].attention
        (total,) = size_arguments(graph, first, (2,), first.next)
        tokens: Count = total
        for site, planned in chosen:
            behind = stream.behind(site.stream)
            removal = _select(graph, stream, site, planned, total, tokens)
            _narrow(graph, stream, behind, removal, tokens)
            _restore(graph, stream, readers, removal, behind)
            tokens = removal.kept
            graph.clean()
            graph.propagate()
        return len(chosen)


@dataclass(frozen=True)
class _Removal:
    """Tokens going: the `stream` that they leave, the `places` [B, kept] of the others, also as an `index` into it, what
    remains, and which of that is `seen` [B, kept]."""

    stream: fx.Node
    places: fx.Node
    index: fx.Node
    kept: Count
    remaining: fx.Node
    seen: fx.Node | None
    restored: str


def token_passes(tokens: tuple[TokenPlan, ...]) -> tuple[Pass, ...]:
    """The passes that remove tokens from a captured graph; none for a plan that removes none."""
    return (FuseAttention(), PruneTokens(tokens)) if removes(tokens) else ()


def removes(tokens: Sequence[TokenPlan]) -> bool:
    """Whether any entry removes anything."""
    return any(one.keep < 1 for one in tokens)


def find_chosen(graph: Graph, tokens: Sequence[TokenPlan]) -> tuple[TokenStream, list[tuple[TokenSite, TokenPlan]]]:
    """The graph's stream, and the sites at which tokens go, in order.

    Raises:
        PlanError: the model has no such place, or a fraction is none.
    """
    stream = find_token_sites(graph)
    if isinstance(stream, str):
        raise PlanError("tokens", "no token can be removed from this model", got=stream, fix="leave tokens out")
    order = [site.name for site in stream.sites]
    if unknown := [one.after for one in tokens if one.after not in order]:
        raise PlanError("tokens", "no such layer has others behind it", got=unknown[0], wanted=f"one of {', '.join(order)}")
    planned = sorted(tokens, key=lambda one: order.index(one.after))
    check_schedule(planned)
    by_name = {site.name: site for site in stream.sites}
    left, chosen = 1.0, []
    for one in planned:
        if one.keep < left:
            chosen.append((by_name[one.after], one))
        left = one.keep
    return stream, chosen


def two_stay(tokens: Sequence[TokenPlan]) -> int:
    """The fewest tokens of an input with which two stay behind every layer: what torch.export needs, to which 1 is a constant."""
    return math.floor(1 / min(one.fraction for one in tokens)) + 1


def _select(
    graph: Graph, stream: TokenStream, site: TokenSite, planned: TokenPlan, total: Count, tokens: Count
) -> _Removal:
    """Gather the tokens that stay behind a layer."""
    seen = arguments(site.attention)["key_padding"]
    importance = write_out(graph, site.attention)
    dim = stream.token_dims[site.stream][0]
    with calls_before(graph, site.stream.next) as call:
        kept = count_kept(call, total, planned.fraction)
        places = select_tokens(call, importance, seen, None, tokens, kept, planned.first)
        standing = places if dim == 1 else call(aten.transpose.int, places, 0, 1)
        width = sizes_of(value_of(site.stream))[2]
        index = call(aten.expand.default, call(aten.unsqueeze.default, standing, 2), [-1, -1, width])
        remaining = call(aten.gather.default, site.stream, dim, index)
        left = None if seen is None else call(aten.gather.default, seen, 1, places)
        return _Removal(site.stream, places, index, kept, remaining, left, planned.restored)


def _narrow(graph: Graph, stream: TokenStream, behind: Sequence[fx.Node], removal: _Removal, tokens: Count) -> None:
    """Let what lies behind a removal compute with the tokens that stay."""
    with calls_before(graph, (removal.seen or removal.remaining).next) as call:
        sizes = _Sizes(call, tokens, removal.kept)
        gathered = {} if removal.seen is None else {source(removal.seen): removal.seen}
        for node in behind:
            if is_call(node, ATTENTION) and (seen := arguments(node)["key_padding"]) is not None:
                if seen not in gathered:
                    gathered[seen] = call(aten.gather.default, seen, 1, removal.places)
                set_argument(node, "key_padding", gathered[seen])
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), sizes.of)
            if isinstance(tokens, int):
                _rewrite_literals(node, stream.token_dims.get(node, ()), tokens, removal.kept)
            node.replace_input_with(removal.stream, removal.remaining)


class _Sizes:
    """Sizes computed from the number of tokens, computed again from how many are kept."""

    def __init__(self, call: Any, tokens: Count, kept: Count):
        self.call, self.kept = call, kept
        self.tokens = size_of(value_of(tokens)) if isinstance(tokens, fx.Node) else tokens
        self.made: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The node, or what stands for it where it is such a size."""
        value = value_of(node)
        if isinstance(value, Tensor | tuple | list) or isinstance(self.tokens, int) or not isinstance(value, torch.SymInt):
            return node
        if size_of(value) == self.tokens:
            return self.kept
        if node not in self.made:
            inputs = [] if is_call(node, aten.sym_size.int) else node.all_input_nodes
            swapped = {one: self.of(one) for one in inputs}
            changed = any(new is not old for old, new in swapped.items())
            args = fx.map_arg(node.args, lambda one: swapped.get(one, one))
            self.made[node] = self.call(node.target, *args) if changed else node
        return self.made[node]


def _rewrite_literals(node: fx.Node, dims: Sequence[int], tokens: int, kept: Count) -> None:
    """Write the number of kept tokens where a static number of all of them was."""
    assert isinstance(kept, int)
    name = RESHAPES.get(node.target)
    if name is None:
        return
    given = arguments(node)
    first = given["dim"] % value_of(given["self"]).ndim if is_call(node, aten.unflatten.int) else 0
    sizes = list(given[name])
    for d in dims:
        if 0 <= d - first < len(sizes) and isinstance(sizes[d - first], int) and sizes[d - first] > 0:
            sizes[d - first] = sizes[d - first] // tokens * kept
    set_argument(node, name, sizes)


def _restore(
    graph: Graph, stream: TokenStream, readers: dict[fx.Node, list[fx.Node]], removal: _Removal, behind: Sequence[fx.Node]
) -> None:
    """Give what reads the stream outside of the layers the removed tokens again."""
    dim, inside = stream.token_dims[removal.stream][0], set(behind)
    for node, outside in readers.items():
        if node in inside and outside:
            # What it will be once sizes are propagated.
            node.meta["val"] = value_of(removal.remaining)
            with calls_before(graph, node.next) as call:
                base, reading = removal.stream, []
                if removal.restored == MEAN:
                    mean, reading = mean_of_real(call, node, dim, removal.seen)
                    # As long as the stream was.
                    base = call(aten.expand_as.default, mean, removal.stream)
                whole = call(aten.scatter.src, base, dim, removal.index, node)
            for user in outside:
                user.replace_input_with(node, whole)
            # An earlier removal's tokens are put back after these.
            readers[node] = [whole, *reading]
