"""The type of a dimension, and unification of two of them.

    Axis = leaf                 an atom: `size` units that nobody has looked inside yet
         | product(f0, f1, ..)  row-major, what view and reshape make        [H*D]   = H x D
         | concat(p0, p1, ..)   what split, slice and cat make               [Q|K|V] = Q | K | V

A dimension of size 1 is the empty product, one of size 0 the empty concatenation. Repetition needs no form of its own:
grouped-query attention is G x R with a fresh R from expand, and rotate-half unifies a | b with b | a, which ties a to b.

Unifying a leaf binds it to the other side; unifying compounds splits both to a common form; what has none is frozen.
Binding is global (union-find), so a parameter that was met before a view sees the split that the view made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import sympy

from tilecut_passes.graph import Size


class Axis:
    """One dimension's type. `frozen` says why its units may not change; `roles` what ops did with it.

    `contended` is why they may not unless the axis turns out to be of a kind whose units may leave a contest (`settle`).
    """

    __slots__ = ("_bound", "_form", "_parts", "contended", "frozen", "roles", "size")

    def __init__(self, size: Size, form: str | None = None, parts: Sequence[Axis] = ()):
        self.size = size
        self._form = form or {1: "product", 0: "concat"}.get(size if isinstance(size, int) else -1)
        self._parts = tuple(parts)
        self._bound: Axis | None = None
        self.contended: str | None = None
        self.frozen: str | None = None
        self.roles: set[str] = set()

    @staticmethod
    def unit() -> Axis:
        """A leaf of one unit, which may go: a residual branch."""
        axis = Axis(1)
        axis._form = None
        return axis

    @property
    def root(self) -> Axis:
        """What this axis has been unified with."""
        axis = self
        while axis._bound is not None:
            axis = axis._bound
        return axis

    @property
    def is_leaf(self) -> bool:
        """Whether nothing is known of its inside."""
        return self.root._form is None

    @property
    def is_product(self) -> bool:
        """Whether it is a product of factors."""
        return self.root._form == "product"

    @property
    def is_concat(self) -> bool:
        """Whether it is a concatenation of pieces."""
        return self.root._form == "concat"

    @property
    def is_static(self) -> bool:
        """Whether its size is a number."""
        return isinstance(self.size, int)

    @property
    def factors(self) -> list[Axis]:
        """The row-major factors; an axis that is no product is its own only factor."""
        axis = self.root
        return [f for part in axis._parts for f in part.factors] if axis._form == "product" else [axis]

    @property
    def pieces(self) -> list[Axis]:
        """The concatenated pieces; an axis that is no concatenation is its own only piece."""
        axis = self.root
        return [p for part in axis._parts for p in part.pieces] if axis._form == "concat" else [axis]

    @property
    def leaves(self) -> list[Axis]:
        """The atoms that it is made of, in order."""
        axis = self.root
        return [axis] if axis._form is None else [leaf for part in axis._parts for leaf in part.leaves]

    @property
    def edges(self) -> list[int]:
        """Where the pieces begin, and where the last one ends (static sizes)."""
        return list(itertools.accumulate((int(p.size) for p in self.pieces), initial=0))

    def freeze(self, why: str) -> Axis:
        """Forbid changing its units; the first reason stays."""
        for leaf in self.leaves:
            leaf.frozen = leaf.frozen or leaf.contended or why
        return self

    def contend(self, why: str) -> Axis:
        """Forbid changing its units unless they are found to be experts or a vocabulary; the first reason stays."""
        for leaf in self.leaves:
            leaf.contended = leaf.contended or why
            if not leaf.is_static:
                leaf.freeze(why)
        return self

    def mark(self, role: str) -> Axis:
        """Note what an op does with it."""
        for leaf in self.leaves:
            leaf.roles.add(role)
        return self

    def become(self, other: Axis) -> None:
        """Bind this root to `other`: from now on it is the same axis."""
        self._bound = other

    def __repr__(self) -> str:
        axis = self.root
        if axis._form is None:
            return f"{axis.size}{'!' if axis.frozen else ''}"
        left, sign, right = ("(", "*", ")") if axis._form == "product" else ("[", "|", "]")
        return left + sign.join(map(repr, axis._parts)) + right


def product(parts: Iterable[Axis]) -> Axis:
    """The row-major product of axes."""
    factors = [f for p in parts for f in p.factors]
    return factors[0] if len(factors) == 1 else Axis(multiply(f.size for f in factors), "product", factors)


def concat(parts: Iterable[Axis]) -> Axis:
    """The concatenation of axes."""
    pieces = [q for p in parts for q in p.pieces]
    return pieces[0] if len(pieces) == 1 else Axis(normal(sum(p.size for p in pieces)), "concat", pieces)


def multiply(sizes: Iterable[Size]) -> Size:
    """The product of sizes."""
    return normal(math.prod(cast(Iterable[int], sizes)))


def normal(size: object) -> Size:
    """An int where the expression is one."""
    expression = sympy.sympify(size)
    return int(expression) if isinstance(expression, sympy.Integer) else cast(sympy.Expr, expression)


def divide(a: Size, b: Size) -> Size | None:
    """a / b as a size, or None when it is none."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    return normal(quotient) if sympy.fraction(quotient)[1] == 1 else None


def coefficient(size: Size) -> int:
    """The integer factor of a size: 12 of 12*s0."""
    return size if isinstance(size, int) else int(sympy.sympify(size).as_coeff_Mul()[0])


def unify(a: Axis, b: Axis, why: str) -> Axis:
    """Make two axes the same; what cannot be is frozen with `why`."""
    a, b = a.root, b.root
    if a is b:
        return a
    if a.size != b.size:
        _freeze_both(a, b, f"{why}: sizes {a.size} and {b.size} meet")
    elif a.is_leaf:
        _bind(a, b)
    elif b.is_leaf:
        _bind(b, a)
    elif a.is_product and b.is_product:
        _unify_products(a, b, why)
    elif a.is_concat and b.is_concat:
        _unify_concats(a, b, why)
    else:
        _unify_mixed(*((a, b) if a.is_product else (b, a)), why)
    return a.root


def _unify_products(a: Axis, b: Axis, why: str) -> None:
    aligned = regroup(a.factors, [f.size for f in b.factors])
    if aligned is None:
        _freeze_both(a, b, f"{why}: no common factors")
        return
    for part, factor in zip(aligned, b.factors):
        if part.root is not b.root:
            unify(part, factor, why)


def _unify_concats(a: Axis, b: Axis, why: str) -> None:
    if a.is_static:
        bounds = sorted({*a.edges, *b.edges})
        first, second = cut_at(a, bounds), cut_at(b, bounds)
    else:
        first, second = a.pieces, b.pieces
    if first is None or second is None or len(first) != len(second):
        _freeze_both(a, b, f"{why}: no common pieces")
        return
    for x, y in zip(first, second):
        unify(x, y, why)


def _unify_mixed(prod: Axis, cat: Axis, why: str) -> None:
    """A product against a concatenation: only whole blocks of the outermost factor can be pieces."""
    parts = cut_at(prod, cat.edges) if cat.is_static else None
    wholes = cut_at(cat, cat.edges) if parts is not None else None
    if parts is None or wholes is None:
        _freeze_both(prod, cat, f"{why}: a product meets a concatenation")
        return
    for x, y in zip(parts, wholes):
        unify(x, y, why)


def _freeze_both(a: Axis, b: Axis, why: str) -> None:
    a.freeze(why)
    b.freeze(why)


def _bind(leaf: Axis, to: Axis) -> None:
    """Make a leaf mean `to`; what was known of it now holds for every leaf of `to`."""
    if leaf in to.leaves:
        to.freeze("occurs in its own refinement")
        return
    for inner in to.leaves:
        if leaf.frozen:
            inner.freeze(leaf.frozen)
        inner.contended = inner.contended or leaf.contended
        inner.roles |= leaf.roles
    leaf.become(to)


def _split_leaf(leaf: Axis, sizes: Sequence[Size], form: str) -> list[Axis]:
    parts = [Axis(s) for s in sizes]
    _bind(leaf, Axis(leaf.size, form, parts))
    return parts


def regroup(factors: Iterable[Axis], sizes: Sequence[Size]) -> list[Axis] | None:
    """Regroup row-major factors into dimensions of `sizes`, splitting leaves as needed; None when impossible.

    Sizes come from an op's output, so a -1 in its arguments never matters; symbolic sizes divide through sympy.
    """
    todo = [f.root for f in factors][::-1]
    out: list[Axis] = []
    for size in sizes:
        taken: list[Axis] = []
        want = size
        while want != 1:
            if not todo:
                return None
            factor = todo.pop().root
            if factor.is_product:
                todo.extend(factor.factors[::-1])
            elif (rest := divide(want, factor.size)) is not None:
                taken.append(factor)
                want = rest
            elif (split := _split_factor(factor, want)) is not None:
                todo.extend(split[::-1])
            else:
                return None
        out.append(product(taken))
    return out if all(f.size == 1 for f in todo) else None


def _split_factor(factor: Axis, want: Size) -> list[Axis] | None:
    """Split a factor so that its first part divides `want`."""
    inner = divide(factor.size, want)
    if factor.is_leaf:
        if inner is not None:
            return _split_leaf(factor, [want, inner], "product")
        if isinstance(factor.size, int) and (common := math.gcd(coefficient(want), factor.size)) > 1:
            return _split_leaf(factor, [common, factor.size // common], "product")
    elif factor.is_concat and isinstance(inner, int) and (whole := _common_inner(factor, inner)) is not None:
        return whole.factors
    return None


def _common_inner(cat: Axis, inner: int) -> Axis | None:
    """Pull the inner factor out of a concatenation: a*m | b*m becomes (a | b) * m."""
    parts = cat.pieces
    if not all(isinstance(p.size, int) and p.size % inner == 0 for p in parts):
        return None
    outer, common = [], Axis(inner)
    for part in parts:
        got = regroup(part.factors, [int(part.size) // inner, inner])
        if got is None:
            return None
        outer.append(got[0])
        unify(common, got[1], "common inner factor")
    whole = product([concat(outer), common])
    cat.become(whole)
    return whole


def cut_at(axis: Axis, bounds: Sequence[int]) -> list[Axis] | None:
    """The pieces of a static axis between consecutive bounds (0 and its size included); None if it cannot be cut there."""
    axis = axis.root
    if len(bounds) == 2:
        return [axis]
    if axis.is_leaf:
        return _split_leaf(axis, [y - x for x, y in itertools.pairwise(bounds)], "concat")
    if axis.is_concat:
        inside: list[tuple[int, Axis]] = []
        for piece, (low, high) in zip(axis.pieces, itertools.pairwise(axis.edges)):
            mine = sorted({low, high, *(b for b in bounds if low < b < high)})
            got = cut_at(piece, [b - low for b in mine])
            if got is None:
                return None
            inside += zip(mine, got)
        return [concat([p for at, p in inside if low <= at < high]) for low, high in itertools.pairwise(bounds)]
    # Through a product: whole blocks of its outermost factor.
    outer, *rest = axis.factors
    block = multiply(f.size for f in rest)
    if not isinstance(block, int) or any(b % block for b in bounds):
        return None
    got = cut_at(outer, [b // block for b in bounds])
    return None if got is None else [product([g, *rest]) for g in got]


def occurrences(
    axis: Axis, leaf: Axis, start: int = 0, inner: tuple[int, ...] = ()
) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Where a leaf's units sit in a static axis: each (start, view, index of the leaf in the view).

    Unit i is index i along that position of `axis[start : start + prod(view)].view(view)`.
    """
    axis = axis.root
    if axis is leaf:
        yield start, (int(axis.size), *inner), 0
    elif axis.is_concat:
        for piece in axis.pieces:
            yield from occurrences(piece, leaf, start, inner)
            start += int(piece.size) * math.prod(inner)
    elif axis.is_product:
        factors = axis.factors
        sizes = tuple(int(f.size) for f in factors)
        for i, factor in enumerate(factors):
            within = (*sizes[i + 1 :], *inner)
            if factor is leaf:
                yield start, (*sizes, *inner), i
            elif leaf in factor.leaves:
                step = sizes[i] * math.prod(within)
                for o in range(math.prod(sizes[:i])):
                    yield from occurrences(factor, leaf, start + o * step, within)
