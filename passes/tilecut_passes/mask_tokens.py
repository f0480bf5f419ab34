"""Hide removed tokens at full length: the reference that `prune_tokens` is compared with.

Before: a graph whose attentions are fused. After, for every entry of the plan: the same tokens are chosen, and the
attentions behind it do not see the others as keys. Where the stream is read outside of the layers, a token that has gone
has the state with which it left, or the mean of the real ones that stayed, as the plan says. Nothing changes its shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.axes.rules_views import set_argument
from tilecut_passes.find_token_sites import ATTENTION
from tilecut_passes.graph import Graph, arguments, calls_before, is_call, size_arguments
from tilecut_passes.prune_tokens import find_chosen
from tilecut_passes.select_tokens import count_kept, mean_of_real, select_tokens, write_out
from tilecut_passes.token_plan import MEAN, TokenPlan

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskTokens:
    """Apply a plan's `tokens` by hiding."""

    tokens: tuple[TokenPlan, ...]

    def __call__(self, graph: Graph) -> int:
        """Hide tokens in place; returns how often they go.

        Raises:
            PlanError: the model has no such place, or a fraction is none.
        """
        stream, chosen = find_chosen(graph, self.tokens)
        readers = stream.readers()
        padding = {n: arguments(n)["key_padding"] for n in graph.nodes if is_call(n, ATTENTION)}
        gone: list[_Gone] = []
        for site, planned in chosen:
            last = gone[-1] if gone else None
            (total,) = size_arguments(graph, site.attention, (2,), site.attention.next)
            importance = write_out(graph, site.attention)
            dim = stream.token_dims[site.stream][0]
            with calls_before(graph, site.stream.next) as call:
                state = site.stream if last is None else call(aten.where.self, last.shown, site.stream, last.state)
                kept = count_kept(call, total, planned.fraction)
                places = select_tokens(
                    call, importance, padding[site.attention], last and last.alive, total, kept, planned.first
                )
                none = call(aten.zeros_like.default, importance, dtype=torch.bool)
                alive = call(aten.scatter.value, none, 1, places, True)
                shown = alive if dim == 1 else call(aten.transpose.int, alive, 0, 1)
                shown = call(aten.unsqueeze.default, shown, 2)
                gone.append(_Gone(site.stream, alive, shown, state, padding[site.attention], planned.restored))
                visible: dict[fx.Node | None, fx.Node] = {None: alive}
                for node in stream.behind(site.stream):
                    if is_call(node, ATTENTION):
                        own = padding[node]
                        if own is not None and own not in visible:
                            visible[own] = call(aten.logical_and.default, own, alive)
                        set_argument(node, "key_padding", visible[own])
        order = {n: i for i, n in enumerate(graph.nodes)}
        for node, outside in readers.items():
            before = [one for one in gone if order[one.stream] < order[node]]
            if not before or not outside:
                continue
            with calls_before(graph, node.next) as call:
                last = before[-1]
                if last.restored == MEAN:
                    real = last.alive if last.seen is None else call(aten.logical_and.default, last.seen, last.alive)
                    filled, _ = mean_of_real(call, node, stream.token_dims[last.stream][0], real)
                else:
                    filled = last.state
                whole = call(aten.where.self, last.shown, node, filled)
            for user in outside:
                user.replace_input_with(node, whole)
        return len(chosen)


@dataclass(frozen=True)
class _Gone:
    """Tokens gone from `stream`: which are still `alive` [B, S], the same as `shown` beside the stream, and its `state`."""

    stream: fx.Node
    alive: fx.Node
    shown: fx.Node
    state: fx.Node
    seen: fx.Node | None
    restored: str
