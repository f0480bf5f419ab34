"""Which of the units that compete may go: experts of a router, and words of a vocabulary.

A softmax over two of three units is what it was over three whose third was minus infinity, so a contest alone forbids
nothing: it is the kind of unit that decides whether that is what removing one means.

    experts     batch a product with a weight, or the rows sorted by winner go through one matrix for each
    vocabulary  rows of a table that ids of the caller choose; no statistics run over it. What the model returns along as
                many units, from a weight that nothing contracts, is along the same vocabulary

Everything else that was contended is frozen, with the first reason.
"""

from __future__ import annotations

from torch import fx

from tilecut_passes.axes.axis import Axis, unify
from tilecut_passes.axes.expert_rows import sorted_products
from tilecut_passes.axes.infer import Axes
from tilecut_passes.graph import value_of


def settle(axes: Axes) -> None:
    """Freeze what competes and is of neither kind."""
    free = _experts(axes)
    for leaf in [leaf for axis in axes.contended for leaf in axis.leaves]:
        if leaf.frozen is None and leaf not in free and not is_vocabulary(leaf):
            leaf.freeze("it is contended for")


def _experts(axes: Axes) -> set[Axis]:
    """Leaves that a product with a weight takes one by one, each where its rows are known."""
    batched = {leaf for sink in axes.sinks for leaf in sink.axis.leaves}
    # Rows can be sorted by what was counted only.
    counted = {leaf for axis in axes.numbers.values() for leaf in axis.leaves}
    routed = {leaf for _, axis in sorted_products(axes) for leaf in axis.leaves}
    found = {leaf for leaf in batched | routed if "expert" in leaf.roles and not leaf.roles & {"norm", "head"}}
    return {leaf for leaf in found if leaf not in routed or leaf in counted}


def is_vocabulary(leaf: Axis) -> bool:
    """Whether a leaf is rows of a table that the caller's ids choose, and may change."""
    return leaf.is_static and leaf.frozen is None and "vocab" in leaf.roles and not leaf.roles & {"norm", "expert"}


def return_rows(axes: Axes, name: str, result: fx.Node) -> list[Axis]:
    """The axes of an output that belong to its caller: all but a last one that is along the vocabulary."""
    types = list(axes.of[result])
    if not types or not value_of(result).is_floating_point():
        return types
    last = types[-1].root
    vocabulary = next((v for v in _vocabularies(axes) if v.size == last.size), None)
    is_contracted = any(last in sink.axis.leaves for sink in axes.sinks)
    if vocabulary is None or not last.is_leaf or last.frozen or "norm" in last.roles:
        return types
    if last is not vocabulary and (is_contracted or last.contended):
        return types
    unify(last, vocabulary, "vocabulary")
    axes.returned.append((name, last.root))
    return types[:-1]


def _vocabularies(axes: Axes) -> list[Axis]:
    rows = [axes.input(node)[0].root for node in axes.lookups]
    return [axis for axis in rows if axis.is_leaf and is_vocabulary(axis)]
