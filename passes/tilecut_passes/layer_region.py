"""The part of a graph that some groups take part in, as a graph of its own: what a cost model times by itself.

Before: a graph, its axes and groups that share contractions (the heads of one layer). After: a `LayerRegion`, whose
graph has
    - every call whose result holds units of the groups, and what reads one: the sinks that contract them;
    - as inputs, the values that come from outside under the names of their nodes, and nothing of what made them. Sizes,
      weights and attention masks are the exception: what computes them comes along, since fusion reads a mask's meaning
      from its sub-graph;
    - as outputs, what the rest of the graph reads of it.
Regions of equal layers have equal signatures. Nothing in here knows an architecture. The dense graph is left alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import Tensor, fx

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import Axes, infer
from tilecut_passes.find_attention import Attention, find_attention
from tilecut_passes.graph import Graph, ancestors, map_nodes, sizes_of, value_of
from tilecut_passes.plan import PrunePlan
from tilecut_runtime.errors import VerificationError


@dataclass(frozen=True)
class LayerRegion:
    """A region and the groups that it was made for, as they are called and typed in its own graph."""

    graph: Graph
    groups: tuple[Group, ...]

    @property
    def signature(self) -> str:
        """Equal for layers that cost the same."""
        return signature_of(self.graph, [f"{g.kind} {g.size}" for g in self.groups])


def find_region(axes: Axes, groups: Sequence[Group]) -> LayerRegion:
    """The region of `groups`, which share contractions.

    Raises:
        VerificationError: the region alone has other groups than the whole graph.
    """
    leaves = {g.axis.root for g in groups}
    sinks = {s.node for s in axes.sinks if not leaves.isdisjoint(s.axis.leaves)}
    calls = [n for n in axes.graph.nodes if n.op == "call_function"]
    holders = {n for n in calls if _holds(axes.of.get(n), leaves)}
    # What reads a holder and is none has sliced the units away: the keys of a fused projection, where only queries go.
    inside = sinks | holders | {user for n in holders for user in n.users if user.op != "output" and _reads(user)}
    inputs, copied = _needed(axes, inside)
    graph = extract(axes.graph, inside, inputs, copied)
    return LayerRegion(graph, matching_groups(graph, groups))


def matching_groups(graph: Graph, groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups of `graph` that own the same slices as those given, which are of a graph that it is a part of."""
    own = find_groups(infer(graph))
    found = []
    for group in groups:
        same = [g for g in own if (g.kind, g.size) == (group.kind, group.size) and set(g.members) == set(group.members)]
        if len(same) != 1:
            raise VerificationError(
                "find_region", f"{group.name} is not one group of its own region", fix="please report the model"
            )
        found.append(same[0])
    return tuple(found)


def resizing(graph: Graph, groups: Sequence[Group], counts: Sequence[int]) -> PrunePlan:
    """The plan that keeps the first units of every group, and pads where `counts` asks for more than there are."""
    plan = PrunePlan.keep_all(graph, groups)
    made = [
        replace(g, kept=g.kept[:n], padded_to=n if n > g.size else None)
        for g, n in zip(plan.groups, counts, strict=True)
    ]
    return replace(plan, groups=tuple(made))


def signature_of(graph: Graph, more: Iterable[str] = ()) -> str:
    """A hash of a graph's ops, literals, shapes and dtypes: everything but names and the numbers in tensors."""
    return hashlib.sha256("\n".join([*more, *describe(graph)]).encode()).hexdigest()


def describe(graph: Graph) -> list[str]:
    """A line for every call of a graph; tensors are shapes and dtypes, numbered by their first use."""
    symbols = {symbol: sympy.Symbol(name) for symbol, name in graph.dims.items()}
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []

    def name(node: fx.Node) -> str:
        if node not in numbers:
            numbers[node] = f"%{len(numbers)}"
            if node.op in ("placeholder", "get_attr"):
                value = value_of(node)
                shape = [s if isinstance(s, int) else s.xreplace(symbols) for s in sizes_of(value)]
                lines.append(f"{numbers[node]} {node.op} {value.dtype} {shape}")
        return numbers[node]

    for node in graph.nodes:
        if node.op in ("call_function", "output"):
            args, kwargs = map_nodes(lambda n: _Name(name(n)), node.args, node.kwargs)
            lines.append(f"{name(node)} {node.target} {args} {kwargs}")
    return lines


class _Name(str):
    """Written without quotes, so that a name and a string differ."""

    def __repr__(self) -> str:
        return str(self)


def _holds(types: Any, leaves: set[Axis]) -> bool:
    """Whether any dimension of a node's result is made of one of the leaves."""
    if isinstance(types, Axis):
        return not leaves.isdisjoint(types.leaves)
    return any(_holds(one, leaves) for one in types or ())


def _needed(axes: Axes, inside: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The values that a region takes from outside, and the nodes that it copies."""
    dynamic = _from_inputs(axes.graph)
    matched = [found for n in inside if isinstance(found := find_attention(axes.graph, n), Attention)]
    masks = {mask for found in matched for mask in found.masks}
    mask_nodes = ancestors(masks)

    def is_input(node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        if node.op == "get_attr" or node in inside or node in axes.weights or not isinstance(value_of(node), Tensor):
            return False
        return node not in axes.constants or (node in dynamic and node not in mask_nodes)

    inputs: set[fx.Node] = set()
    copied: set[fx.Node] = set()
    todo = list(inside)
    while todo:
        node = todo.pop()
        if node in inputs or node in copied:
            continue
        (inputs if is_input(node) else copied).add(node)
        if node in copied:
            todo += node.all_input_nodes
    return inputs, copied


def _from_inputs(graph: Graph) -> set[fx.Node]:
    """Nodes whose values depend on the model's inputs or on their sizes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def extract(whole: Graph, inside: set[fx.Node], inputs: set[fx.Node], copied: set[fx.Node]) -> Graph:
    """A graph of `copied`, with `inputs` as placeholders and what is read outside of `inside` as outputs."""
    new = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in whole.nodes:
        if node in inputs:
            mapped[node] = new.placeholder(node.name)
            mapped[node].meta["val"] = value_of(node)
    for node in whole.nodes:
        if node in copied:
            mapped[node] = new.node_copy(node, lambda n: mapped[n])
            mapped[node].name = node.name
    read = [n for n in whole.nodes if n in inside and any(u not in copied and _reads(u) for u in n.users)]
    new.output(tuple(mapped[n] for n in read))
    states = {}
    for given, continued in whole.states.items():
        node, result = whole.input_node(given), dict(zip(whole.outputs, whole.results))[continued]
        if node in inputs and result in read:
            states[node.name] = result.name
    graph = Graph(
        fx.GraphModule(whole.module, new),
        tuple(n.name for n in whole.nodes if n in inputs),
        tuple(n.name for n in read),
        dims=dict(whole.dims),
        ranges=dict(whole.ranges),
        states=states,
        store=whole.store,
    )
    graph.clean()
    return graph


def _reads(user: fx.Node) -> bool:
    """Whether a node reads a value, and not only its size."""
    return user.op == "output" or isinstance(value_of(user), Tensor | tuple | list)
