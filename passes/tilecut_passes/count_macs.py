"""Count multiply-accumulates of a graph, as a function of how many units each group keeps.

Every contraction contributes the product of its axes' sizes: a linear layer B x S x O x I, attention B x H x Sq x Sk x
(D + E). Softmax, norms and activations have none. Dynamic sizes are fixed by `at`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import sympy
import torch

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.graph import Graph, Size, arguments, is_call, number_of

aten = torch.ops.aten


@dataclass(frozen=True)
class MacTerm:
    """One contraction: its MACs are the product of the sizes of `axes`."""

    node: str
    axes: tuple[Axis, ...]


class MacCounter:
    """MACs of one graph at fixed dynamic sizes.

    Args:
        axes: the inferred axes of the dense graph.
        groups: its groups.
        at: sizes by name, e.g. {"batch": 1, "sequence": 128}; a dynamic size without one reads `sequence`.
    """

    def __init__(self, axes: Axes, groups: list[Group], at: Mapping[str, int]):
        self.terms = mac_terms(axes)
        self.leaf_of = {g.name: g.axis for g in groups}
        self.sequence = at.get("sequence", 128)
        self.at = {symbol: at.get(name, self.sequence) for symbol, name in axes.graph.dims.items()}
        self._cache: dict[tuple[str, ...], list[MacTerm]] = {}

    def total(self, counts: Mapping[str, int] | None = None) -> int:
        """MACs of the whole graph when each named group keeps that many units."""
        return sum(self._term(term, self._leaves(counts)) for term in self.terms)

    def of_groups(self, names: Sequence[str], counts: Mapping[str, int] | None = None) -> int:
        """MACs of the contractions that any of the named groups takes part in."""
        leaves = self._leaves(counts)
        return sum(self._term(term, leaves) for term in self._terms_of(tuple(names)))

    def _terms_of(self, names: tuple[str, ...]) -> list[MacTerm]:
        if names not in self._cache:
            wanted = {self.leaf_of[name] for name in names}
            self._cache[names] = [term for term in self.terms if not wanted.isdisjoint(self._leaves_of(term))]
        return self._cache[names]

    def groups_together(self, names: list[str]) -> list[list[str]]:
        """The named groups, split into sets that share no contraction: their costs add up."""
        name_of = {self.leaf_of[name]: name for name in names}
        sets: list[set[str]] = [{name} for name in names]
        for term in self.terms:
            met = {name_of[leaf] for leaf in self._leaves_of(term) if leaf in name_of}
            if len(met) > 1:
                joined = [s for s in sets if s & met]
                sets = [s for s in sets if not s & met] + [set().union(*joined)]
        order = {name: i for i, name in enumerate(names)}
        return sorted((sorted(s, key=order.__getitem__) for s in sets), key=lambda s: order[s[0]])

    def _leaves(self, counts: Mapping[str, int] | None) -> dict[Axis, int]:
        return {self.leaf_of[name]: n for name, n in (counts or {}).items()}

    def _leaves_of(self, term: MacTerm) -> set[Axis]:
        return {leaf for axis in term.axes for leaf in axis.leaves}

    def _term(self, term: MacTerm, counts: dict[Axis, int]) -> int:
        return math.prod(self._size(axis, counts) for axis in term.axes)

    def _size(self, axis: Axis, counts: dict[Axis, int]) -> int:
        axis = axis.root
        if axis.is_leaf:
            return counts[axis] if axis in counts else self._number(axis.size)
        if axis.is_concat:
            return sum(self._size(p, counts) for p in axis.pieces)
        return math.prod(self._size(f, counts) for f in axis.factors)

    def _number(self, size: Size) -> int:
        """A size as a number; one that data decide counts like a sequence."""
        if isinstance(size, int):
            return size
        unknown = dict.fromkeys(cast(set[sympy.Symbol], size.free_symbols) - self.at.keys(), self.sequence)
        return number_of(size, {**self.at, **unknown})


def mac_terms(axes: Axes) -> list[MacTerm]:
    """Every contraction of the graph."""
    terms = []
    for node in axes.graph.nodes:
        if node.op != "call_function":
            continue
        if is_call(node, aten.scaled_dot_product_attention.default, torch.ops.tilecut.attention.default):
            q, k, v = (axes.input(node, i) for i in range(3))
            terms.append(MacTerm(node.name, (*q, k[-2])))
            terms.append(MacTerm(node.name, (*axes.of[node], v[-2])))
        elif is_call(node, aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default):
            terms.append(MacTerm(node.name, (*axes.of[node], axes.input(node)[-1])))
        elif is_call(node, aten.addmm.default, aten.baddbmm.default):
            terms.append(MacTerm(node.name, (*axes.of[node], axes.input(node, 1)[-1])))
        elif is_call(node, aten.conv1d.default, aten.conv2d.default, aten.convolution.default):
            terms.append(MacTerm(node.name, (*axes.of[node], *axes.of[arguments(node)["weight"]][1:])))
        elif is_call(node, aten._grouped_mm.default):
            terms.append(MacTerm(node.name, (*axes.of[node], axes.input(node)[-1])))
    return terms


def count_parameters(graph: Graph) -> int:
    """Numbers held by the graph's parameters and floating-point buffers."""
    return sum(t.numel() for t in graph.tensors.values() if t.is_floating_point())
