"""The search against brute force, and its refusals."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.groups import Group
from tilecut_passes.search import OPTIMALITY_GAP, Lattice, Limit, search
from tilecut_runtime.errors import ConfigError


def group(name, kind, size):
    return Group(name, kind, size, Axis(size), (), ())


def sizes_of(groups, lattice):
    return {g.name: lattice.sizes(g.kind, g.size) for g in groups}


def limit(budget, per_unit, what="MACs"):
    return Limit(what, budget, lambda names, sizes: sum(per_unit[n] * sizes[n] for n in names))


@settings(max_examples=40)
@given(st.data())
def test_the_plan_is_the_best_of_all(data):
    groups = [group(f"g{i}", "neurons", data.draw(st.integers(2, 9))) for i in range(3)]
    block = data.draw(st.integers(1, 3))
    lattice = Lattice({"neurons": block})
    per_unit = {g.name: data.draw(st.integers(1, 20)) for g in groups}
    curves = {}
    for g in groups:
        scores = data.draw(st.lists(st.floats(0, 10), min_size=g.size, max_size=g.size))
        curves[g.name] = [sum(sorted(scores)[: g.size - k]) for k in range(g.size + 1)]
    options = [lattice.sizes("neurons", g.size) for g in groups]
    cost = lambda sizes: sum(per_unit[g.name] * n for g, n in zip(groups, sizes))
    least, most = cost([o[0] for o in options]), cost([o[-1] for o in options])
    budget = data.draw(st.integers(least, most))
    found = search(groups, [[g.name] for g in groups], curves, sizes_of(groups, lattice), [limit(budget, per_unit)])
    loss = lambda sizes: sum(curves[g.name][n] for g, n in zip(groups, sizes))
    best = min(loss(sizes) for sizes in itertools.product(*options) if cost(sizes) <= budget)
    got = [found[g.name] for g in groups]
    assert cost(got) <= budget
    assert loss(got) == pytest.approx(best, rel=OPTIMALITY_GAP, abs=1e-5)
    assert all(lattice.allows("neurons", n, g.size) for n, g in zip(got, groups))


def test_groups_that_share_a_contraction_are_priced_together():
    groups = [group("a", "heads", 4), group("b", "vo_width", 4)]
    product = Limit("MACs", 4, lambda names, sizes: sizes["a"] * sizes["b"])
    curves = {"a": [8, 4, 2, 1, 0], "b": [8, 4, 2, 1, 0]}
    found = search(groups, [["a", "b"]], curves, sizes_of(groups, Lattice({})), [product])
    assert found["a"] * found["b"] <= 4
    assert curves["a"][found["a"]] + curves["b"][found["b"]] == 4


def test_several_budgets_hold_together():
    groups = [group("a", "neurons", 10), group("b", "neurons", 10)]
    curves = {n: [10.0 - k for k in range(11)] for n in "ab"}
    limits = [limit(12, {"a": 1, "b": 1}), limit(20, {"a": 4, "b": 1}, "bytes")]
    found = search(groups, [["a"], ["b"]], curves, sizes_of(groups, Lattice({"neurons": 1})), limits)
    assert found["a"] + found["b"] == 12
    assert 4 * found["a"] + found["b"] <= 20


def test_an_infeasible_budget_names_the_smallest_reachable():
    groups = [group("a", "neurons", 64)]
    with pytest.raises(
        ConfigError, match=r"no legal model fits the budget of 100 MACs; got the smallest legal one has 160"
    ):
        search(groups, [["a"]], {"a": [0.0] * 65}, sizes_of(groups, Lattice({"neurons": 16})), [limit(100, {"a": 10})])


@pytest.mark.parametrize(
    ("lattice", "kind", "size", "legal"),
    [
        (Lattice({"neurons": 16}), "neurons", 48, [16, 32, 48]),
        (Lattice({"neurons": 16}), "neurons", 50, [16, 32, 48, 50]),
        (Lattice({"neurons": 64}), "neurons", 48, [48]),
        (Lattice({"heads": 1}), "heads", 5, [1, 2, 3, 4, 5]),
        (Lattice({"heads": 1}, frozenset({"heads"})), "heads", 12, [1, 2, 4, 8, 12]),
    ],
)
def test_lattices(lattice, kind, size, legal):
    assert lattice.sizes(kind, size) == legal
    assert all(lattice.allows(kind, n, size) == (n in legal) for n in range(1, size + 1))


def test_a_size_that_is_given_stays():
    groups = [group("a", "heads", 6), group("b", "neurons", 6)]
    curves = {n: [6.0 - k for k in range(7)] for n in "ab"}
    found = search(groups, [["a"], ["b"]], curves, {"a": [5], "b": list(range(1, 7))}, [limit(8, {"a": 1, "b": 1})])
    assert found == {"a": 5, "b": 3}


@settings(max_examples=25)
@given(st.data())
def test_groups_that_must_be_alike_are_the_best_of_all_that_are(data):
    groups = [group(f"g{i}", "neurons", 6) for i in range(3)] + [group("other", "heads", 4)]
    per_unit = {g.name: data.draw(st.integers(1, 9)) for g in groups}
    curves = {}
    for g in groups:
        scores = data.draw(st.lists(st.floats(0, 10), min_size=g.size, max_size=g.size))
        curves[g.name] = [sum(sorted(scores)[: g.size - k]) for k in range(g.size + 1)]
    sizes = sizes_of(groups, Lattice({}))
    same = [["g0", "g2"]]
    every = [dict(zip(sizes, chosen)) for chosen in itertools.product(*sizes.values())]
    every = [one for one in every if one["g0"] == one["g2"]]
    cost = lambda one: sum(per_unit[n] * k for n, k in one.items())
    budget = data.draw(st.integers(min(map(cost, every)), max(map(cost, every))))
    found = search(groups, [[g.name] for g in groups], curves, sizes, [limit(budget, per_unit)], same)
    loss = lambda one: sum(curves[n][k] for n, k in one.items())
    assert found["g0"] == found["g2"]
    assert cost(found) <= budget
    assert loss(found) == pytest.approx(min(loss(one) for one in every if cost(one) <= budget), abs=1e-4)


def test_groups_that_share_no_size_cannot_be_alike():
    groups = [group("a", "neurons", 8), group("b", "neurons", 8)]
    with pytest.raises(ConfigError, match="a and 1 more must have equally many units"):
        search(groups, [["a"], ["b"]], {n: [0.0] * 9 for n in "ab"}, {"a": [8], "b": [4]}, [], [["a", "b"]])


def test_layers_that_are_all_but_alike_are_no_puzzle():
    """As in a random model ranked by magnitude: every unit loses what it costs, but for the fourth digit."""
    noise = random.Random(0)
    groups, curves, per_unit = [], {}, {}
    for i in range(40):
        g = group(f"g{i}", "neurons", 320 if i % 2 else 32)
        per_unit[g.name] = 786_432 if i % 2 else 9_000_001
        lost = [per_unit[g.name] * (1 + 1e-4 * noise.gauss(0, 1)) for _ in range(g.size)]
        curves[g.name] = [sum(lost[k:]) for k in range(g.size + 1)]
        groups.append(g)
    budget = sum(per_unit[g.name] * g.size for g in groups) // 2
    sizes = search(
        groups, [[g.name] for g in groups], curves, sizes_of(groups, Lattice({})), [limit(budget, per_unit)]
    )
    assert 0.999 * budget <= sum(per_unit[n] * k for n, k in sizes.items()) <= budget
