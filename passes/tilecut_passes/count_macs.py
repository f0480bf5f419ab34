"""Count multiply-accumulates of a graph, as a function of how many units each group keeps.

Every contraction contributes the product of its axes' sizes: a linear layer B x S x O x I, attention B x H x Sq x Sk x
(D + E). Softmax, norms and activations have none. Dynamic sizes are fixed by `at`. How long packed sequences are is known
at run time only: they count Tq x H x (D + E) times the keys of the longest that there may be, an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import sympy
import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, normal
from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes, Types, broadcast
from tilecut_passes.axes.rules_contractions import MATMULS
from tilecut_passes.axes.rules_convolutions import CONVOLUTIONS, is_transposed
from tilecut_passes.graph import PACKED_ATTENTION, Graph, Size, arguments, number_of, size_of, source, value_of
from tilecut_passes.project_outputs import is_projection, is_whole_projection

aten = torch.ops.aten


@dataclass(frozen=True)
class MacTerm:
    """One contraction: its MACs are the product of the sizes of `axes`: of the result, of what is contracted, and of the
    residual branches that it runs in (1, or 0 where one is removed)."""

    node: str
    axes: tuple[Axis, ...]
    # A layer that is there only where the model is cut: it costs nothing at the dense sizes.
    spare: bool = False


class MacCounter:
    """MACs of one graph at fixed dynamic sizes.

    Args:
        axes: the inferred axes of the dense graph.
        groups: its groups.
        at: sizes by name, e.g. {"batch": 1, "sequence": 128}; a dynamic size without one is `sequence` too, or what the
            model was traced with where it has to be longer (a waveform); one that counts rows is `batch`.
    """

    def __init__(self, axes: Axes, groups: list[Group], at: Mapping[str, int]):
        self.terms = mac_terms(axes)
        self.leaf_of = {g.name: g.axis for g in groups}
        self.sequence = at.get("sequence", 128)
        self.at = {symbol: self._at(axes.graph, symbol, name, at) for symbol, name in axes.graph.dims.items()}
        self._cache: dict[tuple[str, ...], list[MacTerm]] = {}

    def _at(self, graph: Graph, symbol: sympy.Symbol, name: str, at: Mapping[str, int]) -> int:
        if name in at:
            return at[name]
        if name in graph.row_sizes():
            return at.get("batch", 1)
        return self.sequence if self.sequence >= graph.ranges[name].min else graph.traced_at(symbol)

    def total(self, counts: Mapping[str, int] | None = None) -> int:
        """MACs of the whole graph when each named group keeps that many units."""
        return sum(self.macs_of(term, counts) for term in self.terms)

    def macs_of(self, term: MacTerm, counts: Mapping[str, int] | None = None) -> int:
        """MACs of one contraction."""
        return self._term(term, self._leaves(counts))

    def sizes_of(self, term: MacTerm, counts: Mapping[str, int] | None = None) -> list[int]:
        """The sizes of a contraction's axes."""
        leaves = self._leaves(counts)
        return [self._size(axis, leaves) for axis in term.axes]

    def terms_of(self, names: Sequence[str]) -> list[MacTerm]:
        """The contractions that any of the named groups takes part in."""
        return self._terms_of(tuple(names))

    def of_groups(self, names: Sequence[str], counts: Mapping[str, int] | None = None) -> int:
        """MACs of the contractions that any of the named groups takes part in."""
        leaves = self._leaves(counts)
        return sum(self._term(term, leaves) for term in self.terms_of(names))

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

    def within(self, groups: Sequence[Group]) -> dict[str, list[str]]:
        """Of every residual branch among the groups, the others whose contractions all run in it."""
        leaves = {g.name: g.axis for g in groups if g.kind == "layers"}
        terms = {g.name: self.terms_of([g.name]) for g in groups if g.kind != "layers"}
        return {
            layer: [name for name, own in terms.items() if own and all(leaf in self._leaves_of(t) for t in own)]
            for layer, leaf in leaves.items()
        }

    def _leaves(self, counts: Mapping[str, int] | None) -> dict[Axis, int]:
        return {self.leaf_of[name]: n for name, n in (counts or {}).items()}

    def _leaves_of(self, term: MacTerm) -> set[Axis]:
        return {leaf for axis in term.axes for leaf in axis.leaves}

    def _term(self, term: MacTerm, counts: dict[Axis, int]) -> int:
        if term.spare and all(counts.get(leaf, leaf.size) == leaf.size for axis in term.axes for leaf in axis.leaves):
            return 0
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


class ParameterCounter(MacCounter):
    """Numbers (or bytes) of a graph's tensors, as a function of how many units each group keeps: the same sums.

    Floating tensors count, with `in_bytes` all. A tensor that a removed branch alone reads goes with it.
    """

    def __init__(self, axes: Axes, counter: MacCounter, in_bytes: bool = False):
        self.leaf_of, self.sequence, self.at, self._cache = counter.leaf_of, counter.sequence, counter.at, {}
        nodes = {str(n.target): n for n in axes.graph.nodes if n.op == "get_attr"}
        self.terms = []
        for name, types in axes.tensors.items():
            tensor = axes.graph.tensor(name)
            if in_bytes or tensor.is_floating_point():
                branches = axes.branches_of(nodes[name])
                size = [Axis(tensor.element_size())] if in_bytes else []
                spare = is_whole_projection(name, tensor.shape)
                self.terms.append(MacTerm(name, (*branches, *types, *size), spare))


def mac_terms(axes: Axes) -> list[MacTerm]:
    """Every contraction of the graph."""
    calls = [n for n in axes.graph.nodes if n.op == "call_function" and n.target in TERMS]
    within = {node: axes.branches_of(node) for node in calls}
    return [
        MacTerm(node.name, (*within[node], *sizes), _is_spare(node))
        for node in calls
        for sizes in TERMS[node.target](axes, node)
    ]


def _is_spare(node: fx.Node) -> bool:
    """Whether a layer brings the hidden width back and nothing of it is gone."""
    return is_projection(node) and is_whole_projection(str(source(node, 1).target), value_of(source(node, 1)).shape)


def _matmul(axes: Axes, node: fx.Node) -> list[Types]:
    """The result, and what the left operand contracts."""
    return [[*axes.of[node], *axes.input(node)[-1:]]]


def _add_matmul(axes: Axes, node: fx.Node) -> list[Types]:
    return [[*axes.of[node], axes.input(node, 1)[-1]]]


def _add_batch_matmul(axes: Axes, node: fx.Node) -> list[Types]:
    batch, _, inner = axes.input(node, 1)
    return [[batch, *axes.of[node], inner]]


def _vector_dot(axes: Axes, node: fx.Node) -> list[Types]:
    return [broadcast([axes.input(node), axes.input(node, 1)], node.name)]


def _attention(axes: Axes, node: fx.Node) -> list[Types]:
    """The scores, and the mixing of values."""
    q, k, v = (axes.input(node, i) for i in range(3))
    return [[*q, k[-2]], [*axes.of[node], v[-2]]]


def _packed_attention(axes: Axes, node: fx.Node) -> list[Types]:
    """As if every query met the longest sequence's keys: `max_k` of them, or all that there are where those are fewer."""
    q, k = axes.input(node), axes.input(node, 1)
    longest = arguments(node)["max_k"]
    longest = size_of(value_of(longest) if isinstance(longest, fx.Node) else longest)
    met = Axis(normal(sympy.Min(longest, k[0].size)))
    return [[*q, met], [*axes.of[node][0], met]]


def _convolution(axes: Axes, node: fx.Node) -> list[Types]:
    """Every result, or every input of a transposed one, meets a window of the other's channels in its group."""
    a = arguments(node)
    moved = axes.of[a["input"]] if is_transposed(node, a) else axes.of[node]
    return [[*moved, *axes.of[a["weight"]][1:]]]


TERMS: dict[object, Callable[[Axes, fx.Node], list[Types]]] = {
    **dict.fromkeys((*MATMULS, aten.linear.default, aten.inner.default), _matmul),
    **dict.fromkeys((aten._grouped_mm.default, torch.ops.tilecut.grouped_matmul.default), _matmul),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addmv.default), _add_matmul),
    aten.addbmm.default: _add_batch_matmul,
    aten.linalg_vecdot.default: _vector_dot,
    **dict.fromkeys((aten.scaled_dot_product_attention.default, torch.ops.tilecut.attention.default), _attention),
    PACKED_ATTENTION: _packed_attention,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
}


def count_parameters(graph: Graph) -> int:
    """Numbers held by the graph's parameters and floating-point buffers."""
    return sum(t.numel() for t in graph.tensors.values() if t.is_floating_point())
