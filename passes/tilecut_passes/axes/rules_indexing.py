"""Rules for ops that pick or place by index. Indexed dimensions are frozen, the others pass through.

A boolean index of r dimensions covers r dimensions, and gives one whose size data decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis, unify
from tilecut_passes.axes.infer import Axes, NodeTypes, Types, broadcast, freeze_all, freeze_along, fresh
from tilecut_passes.axes.rules_pieces import between, slice_bounds
from tilecut_passes.graph import source, value_of

aten = torch.ops.aten

INDEXED = "it is indexed"
SCATTERED = "it is scattered to"


@dataclass(frozen=True)
class Picked:
    """What a list of indices does: the dimensions they cover, where theirs come in the result, and how many."""

    covered: tuple[int, ...]
    place: int
    rank: int
    has_mask: bool

    @staticmethod
    def by(indices: list[fx.Node | None]) -> Picked:
        """Read a list of indices; with a gap between them, what they pick comes first."""
        covered: list[int] = []
        at, given = 0, []
        for i, index in enumerate(indices):
            width = 1 if index is None else value_of(index).ndim if _is_mask(index) else 1
            if index is not None:
                given.append(i)
                covered += range(at, at + width)
            at += width
        rank = max((1 if _is_mask(x) else value_of(x).ndim for x in indices if x is not None), default=0)
        has_gap = bool(given) and given != list(range(given[0], given[-1] + 1))
        place = 0 if has_gap or not covered else covered[0]
        return Picked(tuple(covered), place, rank, any(_is_mask(x) for x in indices if x is not None))

    def around(self, types: Types) -> tuple[Types, Types]:
        """The dimensions that no index covers: those before what is picked, and those after."""
        rest = [axis for d, axis in enumerate(types) if d not in self.covered]
        return rest[: self.place], rest[self.place :]


def _is_mask(index: fx.Node) -> bool:
    return value_of(index).dtype in (torch.bool, torch.uint8)


def index(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """x[.., i, j, ..]: indexed dimensions are replaced by the indices' own."""
    indices = [i for i in a["indices"] if i is not None]
    x = axes.read_by(node, source(node), indices)
    how = Picked.by(a["indices"])
    for d in how.covered:
        if how.has_mask:
            x[d].freeze(INDEXED)
        else:
            axes.index_by(x[d], a["indices"][d], INDEXED)
    before, after = how.around(x)
    if not how.has_mask:
        return [*before, *broadcast([axes.operand(node, i) for i in indices], node.name), *after]
    for i in indices:
        freeze_all(axes.operand(node, i), "it picks by a mask")
    out = fresh(value_of(node))
    picked = [axis.freeze("as long as a mask says") for axis in out[how.place : how.place + how.rank]]
    return [*before, *picked, *after]


def index_put(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """x[.., i, j, ..] = values: right-aligned, the values' dimensions are the indices' (frozen) and those not indexed."""
    x, values = axes.operand(node, a["self"]), axes.operand(node, a["values"])
    how = Picked.by(a["indices"])
    for d in how.covered:
        x[d].freeze(INDEXED)
    for i in a["indices"]:
        freeze_all(None if i is None else axes.operand(node, i), INDEXED)
    before, after = how.around(x)
    written = [*before, *[None] * how.rank, *after]
    for value, axis in zip(reversed(values), reversed(written)):
        if axis is None:
            value.freeze(INDEXED)
        elif value.root.size != 1:
            unify(axis, value, node.name)
    return x


def gather(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The gathered dimension is what the index points into, else frozen; the others are the index's."""
    x, picked = axes.read_by(node, source(node), [a["index"]]), axes.operand(node, a["index"])
    if not x or not picked:
        return picked
    axes.index_by(x[a["dim"]], a["index"], "it is gathered")
    picked[a["dim"]].freeze("it is gathered")
    _tie_others(x, picked, a["dim"], None, node.name)
    return picked


def take_along(axes: Axes, node: fx.Node, a: dict[str, Any]) -> NodeTypes:
    """take_along_dim: a gather whose other dimensions stretch."""
    if a["dim"] is None:
        return axes.unknown(node, "take_along_dim of a flattened tensor")
    x, picked = list(axes.input(node)), list(axes.operand(node, a["indices"]))
    d = a["dim"] % len(x)
    x.pop(d).freeze("it is gathered")
    along = picked.pop(d).freeze("it is gathered")
    out = broadcast([x, picked], node.name)
    return [*out[:d], along, *out[d:]]


def take(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """An index into the flattened tensor."""
    freeze_all(axes.input(node), INDEXED)
    return axes.of[a["index"]]


def scatter(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The dimension that is scattered to is what the index points into, else frozen; the others are all one."""
    x, d = axes.operand(node, a["self"]), a["dim"]
    if x and node.target in (aten.scatter.src, aten.scatter.value):
        axes.index_by(x[d], a["index"], SCATTERED)
    elif x:
        x[d].freeze(SCATTERED)
    for name in ("index", "src"):
        if isinstance(a.get(name), fx.Node):
            written = axes.operand(node, a[name])
            _tie_others(x, written, d, None, node.name)
            freeze_all(written[d:][:1], SCATTERED)
    return x


def index_write(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """index_add, index_copy, index_fill, ..: the dimension is frozen; the others are the source's."""
    x = axes.operand(node, a["self"])
    freeze_all(axes.operand(node, a["index"]), INDEXED)
    written = next((a[name] for name in ("source", "value") if isinstance(a.get(name), fx.Node)), None)
    types = [] if written is None else axes.operand(node, written)
    _tie_others(x, types, a["dim"], INDEXED, node.name)
    return x


def _tie_others(x: Types, other: Types, dim: int, why: str | None, where: str) -> None:
    """Make all dimensions but `dim` one, those of unequal sizes frozen; freeze `dim` of both where there is a reason."""
    for d in range(len(x)):
        if d != dim % len(x) and len(other) == len(x):
            unify(x[d], other[d], where)
        elif d == dim % len(x) and why is not None:
            x[d].freeze(why)
            freeze_all(other[d : d + 1], why)


def index_select(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The selected dimension is frozen on both sides."""
    freeze_all(axes.operand(node, a["index"]), INDEXED)
    return freeze_along(axes, node, [a["dim"]], INDEXED)


def copy(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """The source's dimensions are the destination's, right-aligned; size 1 stretches."""
    x, written = axes.input(node), axes.of[a["src"]]
    first = len(x) - len(written)
    tied = [unify(p, q, node.name) if q.root.size != 1 else p for p, q in zip(x[first:], written, strict=True)]
    return [*x[:first], *tied]


def slice_scatter(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Writing a static range: that piece of the destination is the source."""
    x, written = axes.input(node), axes.of[a["src"]]
    dim = a["dim"] % len(x)
    bounds = slice_bounds(a, x[dim].root.size)
    piece = between(x[dim].root, *bounds) if bounds is not None and a["step"] == 1 else None
    if piece is not None:
        unify(piece, written[dim], node.name)
    _tie_others(x, written, dim, None if piece is not None else "slice_scatter that cuts through a factor", node.name)
    return x


def select_scatter(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Writing one index of a dimension, which is frozen."""
    x, written = axes.operand(node, a["self"]), list(axes.operand(node, a["src"]))
    written.insert(a["dim"] % len(x), Axis(1))
    _tie_others(x, written, a["dim"], "one index of it is written", node.name)
    return x


RULES = {
    aten.index.Tensor: index,
    aten.index_put.default: index_put,
    aten.gather.default: gather,
    aten.take_along_dim.default: take_along,
    aten.take.default: take,
    aten.index_select.default: index_select,
    **dict.fromkeys(
        (
            aten.scatter.src,
            aten.scatter.value,
            aten.scatter.reduce,
            aten.scatter.value_reduce,
            aten.scatter_add.default,
            aten.scatter_reduce.two,
        ),
        scatter,
    ),
    **dict.fromkeys(
        (
            aten.index_add.default,
            aten.index_copy.default,
            aten.index_reduce.default,
            aten.index_fill.int_Scalar,
            aten.index_fill.int_Tensor,
        ),
        index_write,
    ),
    aten.copy.default: copy,
    aten.slice_scatter.default: slice_scatter,
    aten.select_scatter.default: select_scatter,
}
