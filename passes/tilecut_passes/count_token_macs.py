"""Count multiply-accumulates of a graph whose tokens go on the way: every contraction behind a removal has fewer of them.

The sizes that run over tokens are those of the plan; the rest is `count_macs`. What choosing tokens costs is counted too:
one product of a row of queries with the attention's probabilities, where padding does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.count_macs import MacCounter, MacTerm
from tilecut_passes.find_token_sites import TokenStream, nodes_between
from tilecut_passes.graph import arguments, sizes_of, value_of
from tilecut_passes.token_plan import TokenPlan


class TokenMacCounter(MacCounter):
    """MACs of one graph under a token plan.

    Args:
        axes, groups, at: as `MacCounter` takes them; of the graph before its attentions are fused.
        stream: found in the fused copy of that graph.
        tokens: the plan's entries.
    """

    def __init__(
        self, axes: Axes, groups: list[Group], at: Mapping[str, int], stream: TokenStream, tokens: Sequence[TokenPlan]
    ):
        super().__init__(axes, groups, at)
        by_name = {n.name: n for n in axes.graph.nodes}
        kept = {one.after: one for one in tokens}
        total = self.tokens = self._number(stream.size)
        # A place on the stream is a node of both graphs; attentions are not.
        places = [by_name[site.stream.name] for site in stream.sites]
        self.of_tokens = set(axes.of[places[0]][stream.token_dims[stream.sites[0].stream][0]].leaves)
        self.left: dict[str, int] = {}
        self._current: int | None = None
        order = {n: i for i, n in enumerate(axes.graph.nodes)}
        left, self.choosing = total, 0
        for site, place in zip(stream.sites, places, strict=True):
            if site.name not in kept:
                continue
            if kept[site.name].count(total) < left and arguments(site.attention)["key_padding"] is not None:
                batch, heads = (self._number(size) for size in sizes_of(value_of(site.attention))[:2])
                self.choosing += batch * heads * left**2
            left = min(left, kept[site.name].count(total))
            self.left |= {n.name: left for n in nodes_between(place, by_name[stream.exit.name], order)}

    def total(self, counts: Mapping[str, int] | None = None) -> int:
        """MACs of the whole graph when each named group keeps that many units."""
        return super().total(counts) + self.choosing

    def _term(self, term: MacTerm, counts: dict[Axis, int]) -> int:
        self._current = self.left.get(term.node)
        made = super()._term(term, counts)
        self._current = None
        return made

    def _size(self, axis: Axis, counts: dict[Axis, int]) -> int:
        root = axis.root
        if self._current is not None and not root.is_product and not self.of_tokens.isdisjoint(root.leaves):
            return self._current
        return super()._size(root, counts)
