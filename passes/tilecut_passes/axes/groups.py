"""Groups: the free atoms of a graph that some parameter holds and some op contracts.

A group knows its members (which slice of which parameter each unit owns), its gates (the activations at which
multiplying by a 0/1 mask equals removing units), its contests (the calls that a removed unit must not win) and a kind,
which comes from what ops did with the atom:

    heads      batches an attention; where an outer factor batches it too, the outer is kv_groups, the inner queries
    qk_width   contracted between queries and keys
    vo_width   the width of the values
    hidden     a norm's statistics run over it, so that removing a unit is not masking it
    experts    batches a product with a weight, or rows that are sorted go through one matrix for each
    vocab      the rows of a table that the caller's ids choose
    neurons    anything else that is contracted
    layers     one unit: a residual branch, there or not (branches.py)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from tilecut_passes.axes.axis import Axis, occurrences
from tilecut_passes.axes.expert_rows import ExpertRows, find_expert_rows, sorted_products
from tilecut_passes.axes.infer import Axes, Contest, Sink
from tilecut_passes.axes.selection import Selection
from tilecut_passes.axes.settle import is_vocabulary


@dataclass(frozen=True)
class Member:
    """Where a group's units sit in one tensor.

    Unit i is index i along `axis` of `parameter.narrow(dim, start, prod(view))` with that dimension seen as `view`.
    """

    parameter: str
    dim: int
    start: int
    view: tuple[int, ...]
    axis: int

    def as_json(self) -> dict[str, Any]:
        """The member as plan.json writes it."""
        return {
            "parameter": self.parameter,
            "dim": self.dim,
            "start": self.start,
            "view": list(self.view),
            "axis": self.axis,
        }


@dataclass(frozen=True)
class Group:
    """Units that live and die together. `axis` is their leaf in the `Axes` they were found in.

    `rows` are where experts can be scaled, and `least` is how many units there must be for contests to have winners.
    """

    name: str
    kind: str
    size: int
    axis: Axis
    members: tuple[Member, ...]
    gates: tuple[Sink, ...]
    contests: tuple[Contest, ...] = ()
    rows: tuple[ExpertRows, ...] = ()
    least: int = 1


@dataclass(frozen=True)
class Frozen:
    """Dimensions of a parameter that may not change, and why."""

    name: str
    why: str


def find_groups(axes: Axes) -> list[Group]:
    """Every group of the graph, in graph order, under unique names."""
    members: dict[Axis, list[Member]] = {}
    dims: dict[Axis, list[Axis]] = {}
    for name, types in axes.tensors.items():
        for dim, axis in enumerate(types):
            if not axis.root.is_static:
                continue
            for leaf in dict.fromkeys(axis.leaves):
                members.setdefault(leaf, []).extend(Member(name, dim, *where) for where in occurrences(axis, leaf))
                dims.setdefault(leaf, []).append(axis)
    for branch in axes.branches:
        owned = {str(n.target) for n in branch.nodes if n.op == "get_attr"}
        shapes = {name: axes.graph.tensor(name).shape for name in axes.tensors if name in owned}
        members[branch.axis] = [Member(name, 0, 0, (1, shape[0]), 0) for name, shape in shapes.items() if shape]
    gates: dict[Axis, list[Sink]] = {}
    for sink in axes.sinks:
        for leaf in dict.fromkeys(sink.axis.leaves):
            gates.setdefault(leaf, []).append(sink)
    found: list[Group] = []
    taken: dict[str, int] = {}
    order = {node: i for i, node in enumerate(axes.graph.nodes)}
    first = {leaf: order[sinks[0].node] for leaf, sinks in gates.items()}
    for leaf, node in _without_gates(axes):
        first[leaf] = min(first.get(leaf, order[node]), order[node])
    parameters, branches = _parameters(axes), {branch.axis for branch in axes.branches}
    for leaf in sorted((x for x in members if x in first), key=lambda x: first[x]):
        if leaf.frozen or not isinstance(leaf.size, int):
            continue
        names = [m.parameter for m in members[leaf]]
        if leaf in branches:
            kind, owner = "layers", _owner_of_branch(axes, names, gates[leaf][0])
        elif leaf.size < 2 or parameters.isdisjoint(names):
            continue
        else:
            kind, owner = _kind(leaf, dims[leaf]), _owner(names)
        name = f"{owner}:{kind}"
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
        contests = tuple(c for c in axes.contests if leaf in c.axis.leaves)
        rows = find_expert_rows(axes, leaf) if kind == "experts" else ()
        found.append(
            Group(
                unique,
                kind,
                leaf.size,
                leaf,
                tuple(members[leaf]),
                tuple(gates.get(leaf, ())),
                contests,
                rows,
                _least(leaf, leaf.size, contests) if kind != "layers" else fewest(kind),
            )
        )
    return found


def _without_gates(axes: Axes) -> list[tuple[Axis, fx.Node]]:
    """Experts of sorted rows and words of a vocabulary: nothing contracts them."""
    routed = [(leaf, node) for node, axis in sorted_products(axes) for leaf in axis.leaves]
    return routed + [(axes.input(node)[0].root, node) for node in axes.lookups if is_vocabulary(axes.input(node)[0].root)]


def fewest(kind: str) -> int:
    """The fewest units that a group of a kind may keep when nothing else is asked: a residual branch may go whole."""
    return 0 if kind == "layers" else 1


def _least(leaf: Axis, size: int, contests: Sequence[Contest]) -> int:
    """The fewest units of a leaf with which every contest has as many as win it."""
    wanted = [c for c in contests if c.winners > 1]
    return next(n for n in range(1, size + 1) if all(_count(c, leaf, n) >= c.winners for c in wanted) or n == size)


def _count(contest: Contest, leaf: Axis, units: int) -> int:
    return Selection({leaf: range(units)}).count(contest.axis)


def find_frozen(axes: Axes) -> list[Frozen]:
    """For every parameter with a frozen dimension of more than one unit, the first reason of each."""
    out = []
    for name in sorted(_parameters(axes)):
        for dim, axis in enumerate(axes.tensors[name]):
            reasons = dict.fromkeys(leaf.frozen for leaf in axis.leaves if leaf.frozen and leaf.size != 1)
            out += [Frozen(f"{name}[{dim}]", why) for why in reasons if why]
    return out


def _parameters(axes: Axes) -> set[str]:
    """Names of tensors that hold floating-point weights, buffers with weights in them included."""
    return {name for name in axes.tensors if axes.graph.tensor(name).is_floating_point()}


def _owner(parameters: list[str]) -> str:
    """The innermost module that holds all of them."""
    paths = [p.split(".")[:-1] for p in dict.fromkeys(parameters)]
    # zip ends with the shortest path; a column that differs ends the prefix.
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*paths))
    return ".".join(column[0] for column in shared) or ".".join(paths[0]) or "model"


def _owner_of_branch(axes: Axes, names: list[str], gate: Sink) -> str:
    """The module of a branch's matrices, since its norms may lie outside; its sum's name where others share them all."""
    held = [name for name in names if axes.graph.tensor(name).is_floating_point()]
    return _owner([name for name in held if axes.graph.tensor(name).ndim > 1] or held) if held else gate.node.name


def _kind(leaf: Axis, dims: list[Axis]) -> str:
    # Queries and keys may be normed head by head: their width is still the heads'.
    if "norm" in leaf.roles and ("head" in leaf.roles or "qk" not in leaf.roles):
        return "hidden"
    if "vocab" in leaf.roles:
        return "vocab"
    if "head" in leaf.roles:
        for axis in dims:
            for piece in axis.pieces:
                heads = [f for f in piece.factors if "head" in f.roles]
                if leaf in heads and len(heads) > 1:
                    return "kv_groups" if heads[0] is leaf else "queries"
        return "heads"
    if "expert" in leaf.roles:
        return "experts"
    if leaf.roles & {"qk", "vo"}:
        return "qk_width" if "qk" in leaf.roles else "vo_width"
    return "neurons"
