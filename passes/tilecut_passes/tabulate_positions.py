"""Turn what a graph computes from the positions of its tokens into tables, read at the positions that each row has.

Before: nodes that no token reaches, with one dimension as long as the text: position ids and their embeddings, cosines and
sines of rotary embeddings, slices of a learned table, counts of a mask's ones. They say where token s of a text stands only
because the text begins at 0.
After, where a node that tokens reach reads one: embedding(table [positions, ..], positions [B, S]), laid out as what reads it
wants. The table is the node's own value for the longest text. Nodes with equal values share it.

A row of such a table must not depend on how long the text is, nor on what stands behind it: the value is computed for several
lengths, and with a padded mask, and compared. Refused, with one error: nodes that change with the length, nodes with two
dimensions of positions, and ways of reading them that are not listed in `READERS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from tilecut_passes.axes.infer import elementwise
from tilecut_passes.axes.rules import RULES
from tilecut_passes.graph import Graph, arguments, calls_before, is_call, sizes_of, source, symbols_of, value_of
from tilecut_passes.mask_probes import SHAPE_ONLY, Evaluation, Probe, ProbeError

# Importing it registers tilecut::rotary.
from tilecut_runtime import rotary as _rotary_op
from tilecut_runtime.errors import LoweringError

aten = torch.ops.aten
assert _rotary_op
ROTARY = torch.ops.tilecut.rotary.default
# Beside those that work on elements alone.
READERS = (ROTARY, aten.cat.default, aten.stack.default)
WHERE = "TabulatePositions"
# What a table may differ by between two lengths of text: rounding.
ROUNDING = 1e-5
# Lengths at which a node is compared with the longest text's.
LENGTHS = (2, 7)


class Whole(Evaluation):
    """The values of a graph's nodes for one text of a given length, weights as they are."""

    def __init__(self, graph: Graph, sizes: Mapping[sympy.Symbol, int], inputs: Mapping[str, Tensor]):
        super().__init__(graph, Probe(dict(sizes), dict(inputs), ()))

    def _value(self, node: fx.Node) -> Any:
        return self.graph.tensor(str(node.target)).detach() if node.op == "get_attr" else super()._value(node)


@dataclass
class TabulatePositions:
    """The tables of one graph.

    Attributes:
        positions: int64 [B, S], where each token stands.
        mask: the name of the input that says which tokens are real; None where there is none.
        batch, length: the symbols of B and S.
        longest: how many positions the tables have.
    """

    graph: Graph
    positions: fx.Node
    mask: str | None
    batch: sympy.Symbol
    length: sympy.Symbol
    longest: int
    tables: list[tuple[Tensor, fx.Node]] = field(default_factory=list)
    reads: dict[tuple[fx.Node, tuple[int, ...], tuple[int, ...]], fx.Node] = field(default_factory=dict)

    def __call__(self, reached: Collection[fx.Node], apart: Collection[fx.Node] = ()) -> int:
        """Give every node of `reached` (by tokens), but those `apart`, tables in the place of positions; returns how many."""
        count = 0
        for node in list(self.graph.nodes):
            if node in reached or not self.is_positional(node):
                continue
            readers = [
                user for user in node.users if user in reached and user not in apart and reads_values(user, node)
            ]
            if not readers:
                continue
            table = self._table(node)
            for user in readers:
                user.replace_input_with(node, self._read(node, user, table))
            count += 1
        return count

    def is_positional(self, node: fx.Node) -> bool:
        """Whether a node is a tensor with a dimension as long as the text."""
        value = value_of(node)
        sizes = sizes_of(value) if isinstance(value, Tensor) else []
        return node.op != "placeholder" and any(self.length in symbols_of(s) for s in sizes)

    def value(self, node: fx.Node, length: int, real: int | None = None) -> Tensor:
        """A node's value for one text of `length` tokens, of which `real` are no padding.

        Raises:
            LoweringError: it cannot be computed.
        """
        mask = {} if self.mask is None else {self.mask: torch.zeros(1, length, dtype=self._mask_dtype())}
        for one in mask.values():
            one[:, :real] = 1
        try:
            return Whole(self.graph, {self.batch: 1, self.length: length}, mask)(node)
        except ProbeError as e:
            raise LoweringError(WHERE, f"what {node.name} holds for each position cannot be computed: {e}") from e

    def _mask_dtype(self) -> torch.dtype:
        node = self.graph.input_node(str(self.mask))
        assert node is not None
        return value_of(node).dtype

    def _place(self, node: fx.Node) -> int:
        """The dimension of a node that is as long as the text."""
        sizes = sizes_of(value_of(node))
        places = [d for d, size in enumerate(sizes) if self.length in symbols_of(size)]
        others = [s for d, s in enumerate(sizes) if d not in places and not isinstance(s, int)]
        if len(places) != 1 or sizes[places[0]] != self.length or others not in ([], [self.batch]):
            raise LoweringError(
                WHERE,
                f"{node.name} holds numbers of positions that are no table of them",
                got=sizes,
                wanted=f"one dimension {self.length}, the length of the text",
            )
        return places[0]

    def _table(self, node: fx.Node) -> fx.Node:
        """A table [longest, R] of a node's values, shared with equal ones."""
        place = self._place(node)
        whole = self.value(node, self.longest).movedim(place, 0)
        for length in {min(n, self.longest) for n in (*LENGTHS, max(self.longest // 2, 1))}:
            self._compare(node, whole, self.value(node, length).movedim(place, 0), length)
            if self.mask is not None:
                padded = self.value(node, min(length + 3, self.longest), length).movedim(place, 0)
                self._compare(node, whole, padded[:length], length)
        return self.hold(whole.reshape(self.longest, -1).contiguous(), f"{node.name}_table")

    def hold(self, table: Tensor, name: str) -> fx.Node:
        """A tensor of the graph that holds a table: the one that holds an equal one, or a new one called `name`."""
        for held, made in self.tables:
            if held.dtype == table.dtype and torch.equal(held, table):
                return made
        made = self.graph.add_tensor(name, table)
        self.tables.append((table, made))
        return made

    def _compare(self, node: fx.Node, whole: Tensor, found: Tensor, length: int) -> None:
        if not torch.allclose(whole[:length].double(), found.double(), rtol=ROUNDING, atol=ROUNDING):
            raise LoweringError(
                WHERE,
                f"{node.name} holds other numbers for the same positions of a longer text",
                got=f"a difference between {length} and {self.longest} tokens",
                wanted="numbers that depend on the position alone: a cache keeps what was computed before",
            )

    def _read(self, node: fx.Node, user: fx.Node, table: fx.Node) -> fx.Node:
        """The rows of a node's table at every token's position, in the layout that `user` reads."""
        pointwise = isinstance(user.target, torch._ops.OpOverload) and (
            torch.Tag.pointwise in user.target.tags or RULES.get(user.target) is elementwise
        )
        if not pointwise and not is_call(user, *READERS):
            raise LoweringError(
                WHERE, f"{user.name} ({user.target}) reads {node.name}, which holds something for each position"
            )
        sizes = sizes_of(value_of(node))
        rank = value_of(user).ndim if pointwise else len(sizes)
        sizes = [1] * (rank - len(sizes)) + sizes
        place = sizes.index(self.length)
        before, after = tuple(sizes[1:place]), tuple(sizes[place + 1 :])
        if place == 0 or sizes[0] not in (1, self.batch) or any(not isinstance(s, int) for s in (*before, *after)):
            raise LoweringError(
                WHERE, f"{user.name} reads {node.name} where no dimension stands for the rows of the batch", got=sizes
            )
        key = table, cast(tuple[int, ...], before), cast(tuple[int, ...], after)
        if key not in self.reads:
            self.reads[key] = self._gathered(*key)
        return self.reads[key]

    def _gathered(self, table: fx.Node, before: tuple[int, ...], after: tuple[int, ...]) -> fx.Node:
        """table[positions] as [B, *before, S, *after]."""
        with calls_before(self.graph, self.positions.next) as call:
            rows = call(aten.embedding.default, table, self.positions)
            if set(before) <= {1}:
                if len(after) != 1:
                    rows = call(aten.unflatten.int, rows, 2, list(after)) if after else call(aten.squeeze.dim, rows, 2)
                for _ in before:
                    rows = call(aten.unsqueeze.default, rows, 1)
                return rows
            apart = call(aten.unflatten.int, rows, 2, [*before, *after])
            order = [0, *range(2, 2 + len(before)), 1, *range(2 + len(before), 2 + len(before) + len(after))]
            return call(aten.permute.default, apart, order)


def table_behind(read: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The tensor [positions, D] and the positions [B, S] of which `read` is the rows, [B, 1, S, D] or [B, S, 1, D]; or None."""
    heads_first = is_call(read, aten.unsqueeze.default) and read.args[1] == 1
    if not heads_first and not (is_call(read, aten.unflatten.int) and arguments(read)["sizes"][0] == 1):
        return None
    rows = source(read)
    if (
        not is_call(rows, aten.embedding.default)
        or source(rows).op != "get_attr"
        or value_of(source(rows, 1)).ndim != 2
    ):
        return None
    return source(rows), source(rows, 1)


def half_of_pairs(table: Tensor, interleaved: bool) -> Tensor | None:
    """A table [positions, D] of which both channels of every pair hold one number, as [positions, D / 2]; None for others."""
    if table.shape[1] % 2:
        return None
    first, second = (table[:, ::2], table[:, 1::2]) if interleaved else table.chunk(2, -1)
    return first.contiguous() if torch.equal(first, second) else None


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by rounding alone, at the size of the largest number of `b`."""
    return torch.allclose(a.double(), b.double(), rtol=ROUNDING, atol=ROUNDING * max(1.0, float(b.abs().max())))


def reached_by(starts: Sequence[fx.Node]) -> set[fx.Node]:
    """The tensors that depend on the values of `starts`, which are among them."""
    found = set(starts)
    for node in starts[0].graph.nodes if starts else ():
        if node.op != "output" and any(one in found and reads_values(node, one) for one in node.all_input_nodes):
            found.add(node)
    return found


def reads_values(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node's values are read, and not only its sizes."""
    if user.op == "output":
        return True
    return isinstance(value_of(user), Tensor | tuple | list) and not (
        is_call(user, *SHAPE_ONLY) and user.args[0] is node
    )
