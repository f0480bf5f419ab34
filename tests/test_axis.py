"""Unification of axes: what view, split and cat may say of a dimension, and what they may not."""

import itertools
import math

import sympy
from hypothesis import given
from hypothesis import strategies as st

from tilecut_passes.axes.axis import Axis, concat, cut_at, divide, occurrences, product, regroup, unify


def test_a_view_splits_a_leaf_and_its_parameter_sees_it():
    axis = Axis(12)
    heads, width = regroup([axis], [3, 4])
    assert repr(axis) == "(3*4)"
    assert axis.leaves == [heads, width]


def test_a_second_view_refines_the_first():
    axis = Axis(24)
    regroup([axis], [4, 6])
    parts = regroup(axis.factors, [4, 2, 3])
    assert [p.size for p in parts] == [4, 2, 3]
    assert [leaf.size for leaf in axis.leaves] == [4, 2, 3]


def test_factors_without_a_common_refinement_give_none():
    assert regroup([Axis(4), Axis(3)], [6, 2]) is None
    assert regroup([Axis(4), Axis(3)], [2, 6]) is not None


def test_rotate_half_ties_the_halves():
    axis = Axis(8)
    first, second = cut_at(axis, [0, 4, 8])
    unify(axis, concat([second, first]), "rotate")
    assert first.root is second.root
    assert axis.leaves == [first.root, first.root]


def test_cat_pieces_are_found_again_by_split():
    q, k = Axis(6), Axis(4)
    assert cut_at(concat([q, k]), [0, 6, 10]) == [q, k]


def test_a_product_is_cut_only_at_whole_blocks():
    axis = product([Axis(4), Axis(3)])
    assert cut_at(axis, [0, 4, 12]) is None
    first, second = cut_at(axis, [0, 6, 12])
    assert (first.size, second.size) == (6, 6)
    assert [leaf.size for leaf in axis.leaves] == [2, 2, 3] or len(axis.leaves) == 3


def test_sizes_that_differ_freeze_both_with_the_reason():
    a, b = Axis(3), Axis(4)
    unify(a, b, "add_7")
    assert a.frozen == b.frozen == "add_7: sizes 3 and 4 meet"


def test_freezing_reaches_what_is_bound_later():
    a, b = Axis(6), Axis(6)
    a.freeze("input")
    unify(a, b, "x")
    parts = regroup([b], [2, 3])
    assert all(p.frozen == "input" for p in parts)


def test_an_axis_cannot_be_part_of_itself():
    a = Axis(6)
    whole = product([a, Axis(1)])
    assert unify(a, whole, "x") is a.root
    twice = Axis(6, "product", [a])
    unify(a, twice, "x")
    assert a.root.leaves


def test_symbolic_sizes_divide():
    s = sympy.Symbol("s", positive=True, integer=True)
    assert divide(12 * s, s) == 12
    assert divide(12 * s, 12) == s
    assert divide(s, 12) is None
    batch, heads = Axis(s), Axis(12)
    assert [p.size for p in regroup([batch, heads], [12 * s])] == [12 * s]
    assert regroup([product([batch, heads])], [s, 12])[1].root is heads.root


def test_dead_ends_freeze_instead_of_guessing():
    a, b = product([Axis(2).freeze("x"), Axis(5)]), concat([Axis(3), Axis(7)])
    unify(a, b, "odd")
    assert all(leaf.frozen for leaf in (*a.leaves, *b.leaves))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_regroup_preserves_row_major_order(factors, data):
    """Joining factors and splitting them again at any boundaries gives back leaves in the same order and sizes."""
    axes = [Axis(f) for f in factors]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(factors)))) | {0, len(factors)})
    groups = [factors[a:b] for a, b in itertools.pairwise(cuts)]
    out = regroup(axes, [math.prod(g) for g in groups])
    assert out is not None
    assert [leaf.size for axis in out for leaf in axis.leaves] == [f for f in factors if f != 1]


@given(st.integers(2, 5), st.integers(2, 5), st.integers(2, 5))
def test_occurrences_name_each_unit_once(outer, size, inner):
    leaf = Axis(size)
    axis = concat([product([Axis(outer), leaf, Axis(inner)]), Axis(3), product([leaf, Axis(inner)])])
    seen = []
    for start, view, at in occurrences(axis, leaf.root):
        strides = [math.prod(view[i + 1 :]) for i in range(len(view))]
        for index in itertools.product(*(range(v) for v in view)):
            seen.append((start + sum(i * s for i, s in zip(index, strides)), index[at]))
    positions = [p for p, _ in seen]
    assert len(set(positions)) == len(positions) == outer * size * inner + size * inner
    assert max(positions) < axis.size
    flat = [u for _, u in sorted(seen)]
    assert flat[: outer * size * inner] == [u for _ in range(outer) for u in range(size) for _ in range(inner)]
