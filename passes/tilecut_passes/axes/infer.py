"""Type every node of a graph in one pass; the rules are in `rules_*.py`.

Parameters are the source of types: each of their dimensions starts as a leaf. What no parameter reaches (masks, rotary
tables, ALiBi slopes, zero biases made in the graph) is a constant, and constants are polymorphic: each use sees fresh
axes of its own, and units are selected there. Otherwise one mask would tie the heads of all layers together.

An op without a rule freezes every dimension that it touches and says so: nothing is ever guessed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from tilecut_passes.axes.axis import Axis, coefficient, unify
from tilecut_passes.axes.branches import Branch, find_branches
from tilecut_passes.graph import Graph, arguments, sizes_of, source, value_of

aten = torch.ops.aten

# Why a dimension that the caller gets is frozen.
RETURNED = "output of the model"

Types = list[Axis]
# One list of axes for a tensor, a list of those for an op with several results, None for what is no tensor.
NodeTypes = Types | list[Types | None] | None
Rule = Callable[["Axes", fx.Node, dict[str, Any]], NodeTypes]


@dataclass(frozen=True)
class Sink:
    """Where a dimension is contracted away: argument `argument` of `node`, dimension `dim`, whose type is `axis`."""

    node: fx.Node
    argument: int
    dim: int
    axis: Axis

    @property
    def source(self) -> fx.Node:
        """The node whose dimension is contracted."""
        return source(self.node, self.argument)


@dataclass(frozen=True)
class Contest:
    """Where units of `axis` compete along dimension `dim` of a call's first argument: softmax, top-k, argmax, a running sum.

    A unit takes no part where it is given `fill` there. `winners` of them are chosen; 0 where none is.
    """

    node: fx.Node
    dim: int
    axis: Axis
    fill: float
    winners: int = 0


@dataclass(frozen=True)
class Border:
    """A constant entering an op that parameters reach: `user` sees `source` with axes of its own."""

    user: fx.Node
    source: fx.Node
    axes: tuple[Axis, ...]


@dataclass
class Axes:
    """What `infer` found. `of` types nodes, `tensors` parameters and buffers by name."""

    graph: Graph
    of: dict[fx.Node, Any] = field(default_factory=dict)
    tensors: dict[str, Types] = field(default_factory=dict)
    # Calls that make a tensor from nothing (arange, zeros): their dims are cut by selecting from them.
    makers: list[fx.Node] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    contests: list[Contest] = field(default_factory=list)
    contended: list[Axis] = field(default_factory=list)
    # What the integers of a node's results are indices into, by result.
    points: dict[tuple[fx.Node, int], Axis] = field(default_factory=dict)
    # (user, source) of borders whose values are such indices, and so have to be renumbered.
    numbers: dict[tuple[fx.Node, fx.Node], Axis] = field(default_factory=dict)
    # Nodes that hold ids which the caller gave; calls that read rows of a table by them; outputs along such rows.
    ids: set[fx.Node] = field(default_factory=set)
    lookups: list[fx.Node] = field(default_factory=list)
    returned: list[tuple[str, Axis]] = field(default_factory=list)
    borders: list[Border] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    constants: set[fx.Node] = field(default_factory=set)
    # Parameters, and what is computed from nothing else.
    weights: set[fx.Node] = field(default_factory=set)

    def input(self, node: fx.Node, index: int = 0) -> Types:
        """The types of a call's argument `index`."""
        return self.of[source(node, index)]

    def branches_of(self, node: fx.Node) -> list[Axis]:
        """The residual branches that a node runs in."""
        return [branch.axis for branch in self.branches if node in branch.nodes]

    def sink(self, node: fx.Node, argument: int, dim: int) -> None:
        """Note that `node` contracts dimension `dim` of its argument."""
        types = self.input(node, argument)
        self.sinks.append(Sink(node, argument, dim % len(types), types[dim]))

    def contest(self, node: fx.Node, dim: int, why: str, fill: float = -math.inf, winners: int = 0) -> Axis:
        """Note that units of dimension `dim` of a call's first argument compete."""
        types = self.input(node)
        self.contests.append(Contest(node, dim % len(types), types[dim], fill, winners))
        return self.contend(types[dim], why)

    def contend(self, axis: Axis, why: str) -> Axis:
        """Freeze an axis unless it turns out to be of a kind that may leave a contest."""
        self.contended.append(axis)
        return axis.contend(why)

    def index_by(self, axis: Axis, index: fx.Node, why: str) -> None:
        """A dimension is read at the indices that `index` holds: it is what they point into, or else frozen."""
        into = self.points.get((index, 0))
        if into is not None and into.root.size == axis.root.size:
            unify(axis, into, why)
        else:
            axis.freeze(why)

    def read_by(self, user: fx.Node, node: fx.Node, index: Iterable[fx.Node]) -> Types:
        """Types of what is read at indices; a constant that is read at those into a dimension gets fresh ones."""
        return self.operand(user, node) if any((i, 0) in self.points for i in index) else self.of[node]

    def operand(self, user: fx.Node, node: fx.Node) -> Types:
        """Types of an elementwise operand; a constant gets fresh ones for this use."""
        axes = self.of[node]
        if node not in self.constants or user in self.constants:
            return axes
        fresh = [Axis(a.root.size) if coefficient(a.root.size) > 1 else a for a in axes]
        self.borders.append(Border(user, node, tuple(fresh)))
        return fresh

    def unknown(self, node: fx.Node, why: str | None = None) -> NodeTypes:
        """Nothing that the op touches may change."""
        why = why or f"no rule for {node.target}"
        for operand in node.all_input_nodes:
            freeze_all(self.of.get(operand), why)
        made = fresh_types(value_of(node))
        freeze_all(made, why)
        return made


def infer(graph: Graph) -> Axes:
    """Type every node of `graph`, in one pass over its nodes."""
    from tilecut_passes.axes.follow_indices import follow_indices, holds_words
    from tilecut_passes.axes.rules import RULES
    from tilecut_passes.axes.settle import return_rows, settle

    axes = Axes(graph)
    states = {graph.input_node(name) for name in graph.states}
    words = {node for name, node in zip(graph.inputs, graph.placeholders) if node not in states and holds_words(name)}
    for node in graph.nodes:
        value = value_of(node)
        is_parameter = node.op == "get_attr" and isinstance(graph.tensor(str(node.target)), nn.Parameter)
        is_state = node in states
        # A number, such as the length of a cache, carries no units.
        is_number = node.op == "call_function" and not isinstance(value, Tensor | tuple | list)
        if is_number or not (is_parameter or is_state or any(x not in axes.constants for x in node.all_input_nodes)):
            axes.constants.add(node)
        read = [x for x in node.all_input_nodes if axes.of[x] is not None]
        if is_parameter or (read and axes.weights.issuperset(read)):
            axes.weights.add(node)
        if node.op == "placeholder":
            axes.of[node] = fresh(cast(Tensor, value))
            freeze_interface(axes.of[node], is_state, "input of the model")
            if node in words:
                axes.ids.add(node)
        elif node.op == "get_attr":
            axes.of[node] = axes.tensors.setdefault(str(node.target), fresh(cast(Tensor, value)))
        elif node.op == "output":
            continued = set(graph.states.values())
            for name, result in zip(graph.outputs, graph.results):
                if (result, 0) in axes.points:
                    axes.points[result, 0].freeze("indices into it are an output of the model")
                freeze_interface(return_rows(axes, name, result), name in continued, RETURNED)
        else:
            axes.of[node] = _apply(axes, node, value, RULES)
            follow_indices(axes, node)
    settle(axes)
    axes.branches = find_branches(graph, {sink.node for sink in axes.sinks})
    axes.sinks += [Sink(one.node, one.argument, 0, one.axis) for one in axes.branches]
    return axes


def _apply(axes: Axes, node: fx.Node, value: Any, rules: dict[Any, Rule]) -> NodeTypes:
    op = node.target
    if op is operator.getitem:
        return axes.of[source(node)][node.args[1]]
    if not isinstance(value, Tensor | tuple | list):
        if op is aten.sym_size.int:
            axes.input(node)[cast(int, node.args[1])].freeze("its size is read")
        else:
            for operand in node.all_input_nodes:
                freeze_all(axes.of.get(operand), f"{op} reads its values")
        return None
    if not isinstance(op, torch._ops.OpOverload):
        return axes.unknown(node)
    if op in rules:
        return rules[op](axes, node, arguments(node))
    if torch.Tag.pointwise in op.tags:
        return elementwise(axes, node, arguments(node))
    return axes.unknown(node)


def elementwise(axes: Axes, node: fx.Node, a: dict[str, Any]) -> Types:
    """Every operand's dimensions are the output's, right-aligned; size 1 stretches."""
    operands = [axes.operand(node, x) for x in node.all_input_nodes if axes.of.get(x) is not None]
    return broadcast(operands, node.name)


def broadcast(operands: list[Types], why: str) -> Types:
    """Unify right-aligned dimensions; those of size 1 stretch."""
    out: Types = []
    for d in range(-max(map(len, operands), default=0), 0):
        here = [one[d] for one in operands if len(one) >= -d and one[d].root.size != 1]
        for other in here[1:]:
            unify(here[0], other, why)
        out.append(here[0] if here else Axis(1))
    return out


def fresh(value: Tensor) -> Types:
    """A new leaf for every dimension."""
    return [Axis(size) for size in sizes_of(value)]


def op_name(node: fx.Node) -> str:
    """The name of a call's op, without its overload."""
    return cast(torch._ops.OpOverload, node.target)._opname


def dims_of(asked: int | Sequence[int] | None, rank: int) -> list[int]:
    """The dimensions that an argument names, counted from 0; None and an empty list name all of them."""
    named = range(rank) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    return sorted({d % rank for d in named}) if rank else []


def freeze_along(axes: Axes, node: fx.Node, dims: Iterable[int], why: str) -> Types:
    """Freeze the named dimensions of the input and of a result of the same rank; the others pass through."""
    x, value = axes.input(node), value_of(node)
    out = fresh(value if isinstance(value, Tensor) else value[0])
    chosen = {d % len(x) for d in dims} if x else set()
    for d in chosen:
        x[d].freeze(why)
        out[d].freeze(why)
    return [out[d] if d in chosen else axis for d, axis in enumerate(x)]


def for_each_result(node: fx.Node, types: Types) -> NodeTypes:
    """`types` for every result of a node that may have several."""
    value = value_of(node)
    return types if isinstance(value, Tensor) else [list(types) for _ in value]


def result_is_used(node: fx.Node, index: int) -> bool:
    """Whether anything reads result `index` of a call with several."""
    return any(user.args[1] == index and user.users for user in node.users)


def fresh_types(value: Any) -> NodeTypes:
    """New leaves for whatever a node returns."""
    if isinstance(value, Tensor):
        return fresh(value)
    if isinstance(value, tuple | list):
        return [fresh(v) if isinstance(v, Tensor) else None for v in value]
    return None


def freeze_interface(types: Types, is_state: bool, why: str) -> None:
    """Freeze what the caller sees; a cache belongs to the model, and only its dynamic sizes are the caller's."""
    for axis in types:
        if not is_state or not axis.root.is_static:
            axis.freeze(why)


def freeze_all(types: Any, why: str) -> None:
    """Freeze every axis of a node's types."""
    for one in types or ():
        if isinstance(one, Axis):
            one.freeze(why)
        else:
            freeze_all(one, why)
