"""The hypotheses about an attention mask: atoms, each a set of pairs that it lets through.

With `behind` = i + shift - j, shift = 0 (top-left) or Sk - Sq (bottom-right):

    causal          behind >= 0
    left, right     behind <= left; -behind <= right: the tightest bound over all probes of one set of literals
    window, global  a band, or one of the first n positions: j < n or i + shift < n
    key padding     an input compared with a literal (`attention_mask != 0`, `input_ids != 1`), or an inner bool node
    packed          both positions lie in one segment: equal ids; positions that start again at 0; that do not follow
    chunk           both positions lie in one run of c
    query padding   as key padding, for queries

An atom is kept when no visible pair lies outside it on any probe. A mask means a product of atoms when they together
let through exactly what is visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, sizes_of, value_of
from tilecut_passes.mask_probes import LARGE, Evaluation, ProbeError, literals_of

PREDICATES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ne": torch.ne, "eq": torch.eq, "gt": torch.gt, "ge": torch.ge, "lt": torch.lt, "le": torch.le,
}  # fmt: skip
SIGNS = {"ne": "!=", "eq": "==", "gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass
class Observation:
    """What a mask does on one probe.

    Attributes:
        visible: bool [B|1, Sq, Sk].
        free: pairs of which nothing is asked, of the same shape: `(1 - mask) * min` means nothing for a mask of 2.
        bias: what is added to the scores, [B|1, H|1, Sq|1, Sk], 0 where nothing is visible; None where it was not kept.
    """

    values: Evaluation
    visible: Tensor
    free: Tensor
    bias: Tensor | None
    sq: int
    sk: int
    columns: Tensor = field(init=False)

    def __post_init__(self):
        self.columns = self.visible.any(-2, keepdim=True)

    @property
    def literals(self) -> tuple[tuple[int, int], ...]:
        """What this probe's large literals were replaced by."""
        return tuple(sorted(self.values.probe.literals.items()))

    def behind(self, shift: str) -> Tensor:
        """How far each key lies behind each query, [Sq, Sk]."""
        moved = self.sk - self.sq if shift == "bottom_right" else 0
        return (
            torch.arange(self.sq, dtype=torch.int32)[:, None] + moved - torch.arange(self.sk, dtype=torch.int32)[None]
        )


@dataclass(frozen=True)
class Padding:
    """Keys where `source`, an input or an inner bool node, compares with `literal` are seen."""

    source: str
    test: str = "ne"
    literal: int = 0

    def __str__(self) -> str:
        return f"{self.source} {SIGNS[self.test]} {self.literal}"


@dataclass(frozen=True)
class Segments:
    """Positions of one segment see one another; `kind` says how `source`, an input or an inner node, tells segments apart.

    `SEGMENTS` has the kinds: ids (equal ones, wherever they are), restarts (a segment begins at a 0), breaks (it begins at
    a position that is not the one before plus 1).
    """

    source: str
    kind: str

    def __str__(self) -> str:
        return self.source


@dataclass(frozen=True)
class Atom:
    """A set of pairs: `allowed` [B|1, Sq|1, Sk|1] on an observation, None where the atom does not fit its sizes."""

    kind: str
    value: Any
    allowed: Callable[[Observation], Tensor | None]

    def holds(self, seen: Sequence[Observation]) -> bool:
        """Whether everything that is visible is allowed."""
        for one in seen:
            allowed = self.allowed(one)
            if allowed is None or not _fits(allowed, one.visible):
                return False
            visible = one.columns if allowed.shape[-2] == 1 else one.visible
            if bool((visible & ~allowed).any()):
                return False
        return True

    def size(self, seen: Sequence[Observation]) -> int:
        """How many pairs it allows, of those of which something is asked."""
        allowed = [(self.allowed(one), one.free) for one in seen]
        return sum(int((pairs & ~free).sum()) for pairs, free in allowed if pairs is not None)


def equal(atoms: Sequence[Atom], seen: Sequence[Observation]) -> bool:
    """Whether the atoms' product is what is visible, on every probe."""
    for one in seen:
        product = torch.ones(1, 1, 1, dtype=torch.bool)
        for atom in atoms:
            allowed = atom.allowed(one)
            assert allowed is not None
            product = product & allowed
        if bool(((product != one.visible) & ~one.free).any()):
            return False
    return True


def atoms_of(
    graph: Graph, cone: Sequence[fx.Node], seen: Sequence[Observation], shift: str, global_tokens: int
) -> Iterator[Atom]:
    """The atoms for one place of the diagonal and one number of global tokens, most wanted first."""
    yield from _bands(seen, shift, global_tokens)
    names = dict(zip(graph.placeholders, graph.inputs))
    inputs = [n for n in cone if n.op == "placeholder"]
    inner = [n for n in cone if n.op == "call_function" and isinstance(value_of(n), Tensor) and value_of(n).ndim == 2]
    # Only nodes that hold something of an input.
    inner = [n for n in inner if not _is_constant(n, inputs)]
    literals = sorted(
        {0, 1, *(s * x for x in literals_of(cone) if x <= LARGE for s in (1, -1))}, key=lambda x: (abs(x), -x)
    )
    # Lengths [B] are no mask by themselves: the inner node that compares places with them is.
    inputs = [n for n in inputs if value_of(n).ndim == 2]
    paddings = [(n, Padding(names[n], test, x)) for n in inputs for x in literals for test in PREDICATES]
    truths = [n for n in inner if value_of(n).dtype == torch.bool]
    paddings += [(n, Padding(n.name, test)) for n in truths for test in ("ne", "eq")]
    for node, padding in paddings:
        yield Atom("padding", padding, lambda one, n=node, p=padding: _padding(one, n, p, -2))
    whole = [
        n for n in (*inputs, *inner) if value_of(n).dtype not in (torch.bool,) and not value_of(n).is_floating_point()
    ]
    for node in whole:
        name = names.get(node, node.name)
        for kind in SEGMENTS if node in names else ("ids",):
            yield Atom("segments", Segments(name, kind), lambda one, n=node, k=kind: _segments(one, n, k))
    for c in sorted(literals_of(cone)):
        yield Atom("chunk", c, lambda one, c=c: _chunk(one, shift, c))
    for node, padding in paddings:
        yield Atom("query padding", padding, lambda one, n=node, p=padding: _padding(one, n, p, -1))


def _is_constant(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    todo, seen = [node], set()
    while todo:
        one = todo.pop()
        if one in inputs:
            return False
        if one not in seen:
            seen.add(one)
            todo += one.all_input_nodes
    return True


def _bands(seen: Sequence[Observation], shift: str, n: int) -> Iterator[Atom]:
    """Causality and the window, with n global tokens outside of the window."""
    is_causal = _bound(seen, shift, -1, 0) == 0
    if is_causal:
        yield Atom("causal", shift, lambda one: (one.behind(shift) >= 0)[None])
    left = _bound(seen, shift, 1, n)
    right = None if is_causal else _bound(seen, shift, -1, n)
    if n:
        if left is None and right is None:
            return
        yield Atom(
            "window", (left, right), lambda one: (_band(one, shift, left, right) | _is_global(one, shift, n))[None]
        )
        return
    if left is not None:
        yield Atom("left", left, lambda one: _band(one, shift, left, None)[None])
    if right is not None:
        yield Atom("right", right, lambda one: _band(one, shift, None, right)[None])


def _band(one: Observation, shift: str, left: int | tuple | None, right: int | tuple | None) -> Tensor:
    behind = one.behind(shift)
    allowed = torch.ones_like(behind, dtype=torch.bool)
    if left is not None:
        allowed &= behind <= _at(left, one)
    if right is not None:
        allowed &= -behind <= _at(right, one)
    return allowed


def _is_global(one: Observation, shift: str, n: int) -> Tensor:
    moved = one.sk - one.sq if shift == "bottom_right" else 0
    return (torch.arange(one.sk)[None] < n) | (torch.arange(one.sq)[:, None] + moved < n)


def _at(bound: int | tuple[int, int], one: Observation) -> int:
    """A bound on one probe: a number, or (large literal, what is added to it)."""
    if isinstance(bound, int):
        return bound
    literal, more = bound
    return dict(one.literals).get(literal, literal) + more


def bound_in_reality(bound: int | tuple[int, int] | None) -> int:
    """A bound with its literal as it is written; -1 for none."""
    if bound is None:
        return -1
    return bound if isinstance(bound, int) else bound[0] + bound[1]


def _bound(seen: Sequence[Observation], shift: str, sign: int, n: int) -> int | tuple[int, int] | None:
    """The tightest bound on `sign * behind` of visible pairs; None where a set of probes shows none.

    Where large literals were replaced, the bound must be one of them plus a constant.
    """
    tightest: dict[tuple[tuple[int, int], ...], int] = {}
    extent: dict[tuple[tuple[int, int], ...], int] = {}
    for one in seen:
        far = sign * one.behind(shift)
        visible = one.visible & ~_is_global(one, shift, n) if n else one.visible
        key = one.literals
        extent[key] = max(int(far.max()), extent.get(key, -(1 << 40)))
        if bool(visible.any()):
            furthest = int(far.expand_as(visible)[visible].max())
            tightest[key] = max(furthest, tightest.get(key, -(1 << 40)))
    shrunk = {key: x for key, x in tightest.items() if key} or tightest
    if not shrunk or any(x >= extent[key] for key, x in shrunk.items()):
        return None
    found = set(shrunk.values())
    if len(found) == 1:
        return found.pop()
    (first, *_) = shrunk
    for literal, value in first:
        more = shrunk[first] - value
        if all(x == dict(key)[literal] + more for key, x in shrunk.items()):
            return literal, more
    return None


def _fits(allowed: Tensor, visible: Tensor) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(allowed.shape, visible.shape))


def _of_length(one: Observation, node: fx.Node, length: int) -> Tensor | None:
    try:
        value = one.values(node)
    except ProbeError:
        return None
    return value if value.ndim == 2 and value.shape[1] == length else None


def _padding(one: Observation, node: fx.Node, padding: Padding, dim: int) -> Tensor | None:
    value = _of_length(one, node, one.sk if dim == -2 else one.sq)
    return None if value is None else PREDICATES[padding.test](value, padding.literal).unsqueeze(dim)


def _segments(one: Observation, node: fx.Node, kind: str) -> Tensor | None:
    value = _of_length(one, node, one.sk)
    if value is None or one.sq != one.sk:
        return None
    segment = SEGMENTS[kind](value)
    return segment[:, :, None] == segment[:, None, :]


def _chunk(one: Observation, shift: str, c: int) -> Tensor:
    size = dict(one.literals).get(c, c)
    moved = one.sk - one.sq if shift == "bottom_right" else 0
    return ((torch.arange(one.sq)[:, None] + moved) // size == torch.arange(one.sk)[None] // size)[None]


def _restarts(positions: Tensor) -> Tensor:
    return (positions == 0).long().cumsum(-1)


def _breaks(positions: Tensor) -> Tensor:
    """A new segment wherever a position is not the one before plus 1."""
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).long().cumsum(-1)


SEGMENTS: dict[str, Callable[[Tensor], Tensor]] = {"ids": lambda x: x, "restarts": _restarts, "breaks": _breaks}


def sizes_fit(value: Tensor, sq: int, sk: int) -> bool:
    """Whether a mask's last dimensions are those of the scores, or 1."""
    return value.ndim >= 2 and value.shape[-2] in (1, sq) and value.shape[-1] in (1, sk)


def is_grid(node: fx.Node, queries: Any, keys: Any) -> bool:
    """Whether a node is as large as the scores: its last two dimensions are those of queries and keys."""
    value = value_of(node)
    return isinstance(value, Tensor) and value.ndim >= 2 and sizes_of(value)[-2:] == [queries, keys]
