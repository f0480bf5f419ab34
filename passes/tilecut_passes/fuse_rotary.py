"""Replace rotary position embedding, written out, by one `tilecut::rotary`.

Before: x * cos + rotate(x) * sin, where rotate(x) is
    halves        cat(-x2, x1) of x's two halves, cut by slices, split or chunk
    interleaved   -x[1::2] and x[::2], stacked behind each other and flattened
or, with tables half as wide, cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin) of the halves.
After: tilecut::rotary(x, cos, sin, interleaved=..), x of four dimensions in either layout. Where only the first part of a
head is turned, x is the slice. Tables half as wide are doubled, once for all that share them.
Left alone: tables half as wide of neighbours, two calls that make one table in a single embedding of halves. With the reason
in `graph.refusals`: x of another rank, tables that do not broadcast to x or have another type.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, Refusal, arguments, calls_before, is_call, sizes_of, source, value_of

# Importing it registers tilecut::rotary.
from tilecut_runtime import rotary as _rotary_op

aten = torch.ops.aten
assert _rotary_op


@dataclass(frozen=True)
class Rotary:
    """x, its tables, and whether neighbours are pairs; `halved` tables are half as wide as x."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool = False
    halved: bool = False


@dataclass(frozen=True)
class FuseRotary:
    """Every rotary embedding becomes one op."""

    def match(self, node: fx.Node) -> Rotary | str | None:
        """The embedding whose result is `node`, the reason why it cannot be fused, or None."""
        found = _sum(node) or _joined(node)
        return found if found is None else _misfit(found) or found

    def __call__(self, graph: Graph) -> int:
        """Fuse in place; returns the number of embeddings."""
        count = 0
        doubled: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            found = self.match(node)
            if isinstance(found, str):
                graph.refusals.append(Refusal("FuseRotary", node.name, found))
            if not isinstance(found, Rotary):
                continue
            cos, sin = found.cos, found.sin
            if found.halved:
                cos, sin = (_twice(graph, table, doubled) for table in (cos, sin))
            with calls_before(graph, node) as call:
                cos, sin = (
                    table if value_of(table).ndim == 4 else call(aten.reshape.default, table, _four(table))
                    for table in (cos, sin)
                )
                made = call(torch.ops.tilecut.rotary.default, found.x, cos, sin, interleaved=found.interleaved)
            node.replace_all_uses_with(made)
            graph.fx.erase_node(node)
            count += 1
        return count


def dimension_of_heads(node: fx.Node) -> int | None:
    """Which dimension of a `tilecut::rotary`'s x the heads are: one of known size along which the table is repeated, unlike
    along the other; None where neither is."""
    x, cos = (sizes_of(value_of(source(node, i))) for i in (0, 1))
    return next((d for d in (1, 2) if cos[d] == 1 and cos[3 - d] == x[3 - d] and isinstance(x[d], int)), None)


def _products(node: object) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operands of a product of two nodes, in both orders."""
    if is_call(node, aten.mul.Tensor) and len(node.all_input_nodes) == 2:
        yield source(node), source(node, 1)
        yield source(node, 1), source(node)


def _terms(node: object, op: object) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operands of a sum, in both orders, or of a difference, in its own."""
    if not is_call(node, op) or arguments(node)["alpha"] != 1 or len(node.all_input_nodes) != 2:
        return
    yield source(node), source(node, 1)
    if op is aten.add.Tensor:
        yield source(node, 1), source(node)


def _sum(node: fx.Node) -> Rotary | None:
    """x * cos + rotate(x) * sin."""
    for straight, turned in _terms(node, aten.add.Tensor):
        for rotated, sin in _products(turned):
            found = _rotated(rotated)
            if found is None:
                continue
            for x, cos in _products(straight):
                if x is found[0]:
                    return Rotary(x, cos, sin, interleaved=found[1])
    return None


def _rotated(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The x whose pairs a node turns, and whether they are neighbours, or None."""
    if is_call(node, aten.cat.default) and _is_last(node):
        parts = [_piece(part) for part in _negated_first(arguments(node)["tensors"])]
        return _whole(parts, interleaved=False)
    if not is_call(node, aten.reshape.default, aten.flatten.using_ints):
        return None
    stacked = source(node)
    if not is_call(stacked, aten.stack.default) or arguments(stacked)["dim"] not in (-1, value_of(stacked).ndim - 1):
        return None
    outer = sizes_of(value_of(stacked))[:-2]
    if sizes_of(value_of(node)) != [*outer, 2 * value_of(stacked).shape[-2]]:
        return None
    parts = [_piece(part) for part in _negated_first(arguments(stacked)["tensors"])]
    return _whole(parts, interleaved=True)


def _is_last(node: fx.Node) -> bool:
    return arguments(node)["dim"] in (-1, value_of(node).ndim - 1)


def _negated_first(tensors: list[fx.Node]) -> list[fx.Node]:
    """The two parts of a rotated x without the sign of the first; none where it has no sign."""
    if len(tensors) != 2 or not is_call(tensors[0], aten.neg.default):
        return []
    return [source(tensors[0]), tensors[1]]


def _whole(parts: list[tuple[fx.Node, str] | None], interleaved: bool) -> tuple[fx.Node, bool] | None:
    """The x of which the parts are the second and the first half, or the odd and the even places."""
    wanted = ["odd", "even"] if interleaved else ["second", "first"]
    found = [part for part in parts if part is not None]
    if [kind for _, kind in found] != wanted or found[0][0] is not found[1][0]:
        return None
    return found[0][0], interleaved


def _piece(node: fx.Node) -> tuple[fx.Node, str] | None:
    """What a node is a half of, and which: "first", "second", "even" or "odd" of the last dimension; or None."""
    if is_call(node, operator.getitem):
        pieces = source(node)
        if not is_call(pieces, aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default):
            return None
        x = source(pieces)
        sizes = [sizes_of(piece)[-1] for piece in value_of(pieces)]
        if arguments(pieces)["dim"] not in (-1, value_of(x).ndim - 1) or len(sizes) != 2 or sizes[0] != sizes[1]:
            return None
        return x, ("first", "second")[node.args[1]]  # type: ignore[index]
    if not is_call(node, aten.slice.Tensor):
        return None
    a, x = arguments(node), source(node)
    width = value_of(x).shape[-1]
    static = isinstance(width, int) and all(isinstance(a[name] or 0, int) for name in ("start", "end"))
    if not static or width % 2 or a["dim"] not in (-1, value_of(x).ndim - 1):
        return None
    ranges = {
        (0, width // 2, 1): "first",
        (width // 2, width, 1): "second",
        (0, width, 2): "even",
        (1, width, 2): "odd",
    }
    kind = ranges.get((*slice(a["start"], a["end"]).indices(width)[:2], a["step"]))
    return None if kind is None else (x, kind)


def _joined(node: fx.Node) -> Rotary | None:
    """cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin), the tables half as wide."""
    if not is_call(node, aten.cat.default) or not _is_last(node) or len(arguments(node)["tensors"]) != 2:
        return None
    upper, lower = arguments(node)["tensors"]
    for a, b in _terms(upper, aten.sub.Tensor):
        for c, d in _terms(lower, aten.add.Tensor):
            for (x1, cos), (x2, sin) in ((p, q) for p in _products(a) for q in _products(b)):
                crossed = (x2, cos) in _products(c) and (x1, sin) in _products(d)
                found = _whole([_piece(x2), _piece(x1)], interleaved=False) if crossed else None
                if found is not None:
                    return Rotary(found[0], cos, sin, halved=True)
    return None


def _misfit(found: Rotary) -> str | None:
    """Why the op cannot take these operands, or None."""
    x: Tensor = value_of(found.x)
    if x.ndim != 4:
        return f"x has {x.ndim} dimensions, wanted 4"
    width = x.shape[-1] // 2 if found.halved else x.shape[-1]
    wanted = [*sizes_of(x)[:-1], width]
    for name, node in (("cos", found.cos), ("sin", found.sin)):
        table: Tensor = value_of(node)
        if table.dtype != x.dtype:
            return f"x is {x.dtype} and {name} {table.dtype}"
        sizes = sizes_of(table)
        if table.ndim > 4 or sizes[-1:] != [width] or any(n not in (1, m) for n, m in zip(sizes[::-1], wanted[::-1])):
            return f"{name} {sizes} does not broadcast to {wanted}"
    return None


def _four(table: fx.Node) -> list[int]:
    """The shape of a table of fewer dimensions as one of four, with one size at most that is not static."""
    sizes = list(value_of(table).shape)
    return [1] * (4 - len(sizes)) + [size if isinstance(size, int) else -1 for size in sizes]


def _twice(graph: Graph, table: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """A table beside itself, made behind the table."""
    if table not in made:
        with calls_before(graph, table.next if table.op == "call_function" else graph.first_call()) as call:
            made[table] = call(aten.cat.default, [table, table], -1)
    return made[table]
