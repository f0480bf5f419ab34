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


def chain(count, size, seed=0):
    """Layers without residuals: every two neighbours share a product. Sizes in blocks of an eighth."""
    noise = random.Random(seed)
    groups = [group(f"g{i}", "neurons", size) for i in range(count)]
    curves = {}
    for g in groups:
        scores = sorted(noise.random() ** 3 for _ in range(size))
        curves[g.name] = [sum(scores[: size - k]) for k in range(size + 1)]

    def cost(names, sizes):
        assert list(names) == [g.name for g in groups]
        widths = [size, *(sizes[n] for n in names), size]
        return sum(a * b for a, b in itertools.pairwise(widths))

    return groups, curves, sizes_of(groups, Lattice({"neurons": size // 8})), cost


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_the_way_down_a_chain_is_nearly_the_best_of_all(monkeypatch, share, seed):
    groups, curves, sizes, cost = chain(4, 16, seed)
    names = [g.name for g in groups]
    budget = share * cost(names, dict.fromkeys(names, 16))
    every = [dict(zip(names, chosen)) for chosen in itertools.product(*(sizes[n] for n in names))]
    loss = lambda one: sum(curves[n][k] for n, k in one.items())
    best = min(loss(one) for one in every if cost(names, one) <= budget)
    assert loss(search(groups, [names], curves, sizes, [Limit("MACs", budget, cost)])) == pytest.approx(best, rel=1e-4)
    monkeypatch.setattr("tilecut_passes.search.MOST_OPTIONS", 100)
    found = search(groups, [names], curves, sizes, [Limit("MACs", budget, cost)])
    assert cost(names, found) <= budget
    assert best - 1e-4 <= loss(found) <= 1.2 * best


def test_a_chain_of_many_layers_is_searched_and_its_smallest_model_named():
    groups, curves, sizes, cost = chain(30, 1024)
    names = [g.name for g in groups]
    whole = cost(names, dict.fromkeys(names, 1024))
    found = search(groups, [names], curves, sizes, [Limit("MACs", whole // 2, cost)])
    assert 0.45 * whole < cost(names, found) <= whole // 2
    assert all(found[n] in sizes[n] for n in names)
    least = cost(names, dict.fromkeys(names, 128))
    assert search(groups, [names], curves, sizes, [Limit("MACs", least, cost)]) == dict.fromkeys(names, 128)
    with pytest.raises(ConfigError, match=f"the smallest legal one has {least:,}"):
        search(groups, [names], curves, sizes, [Limit("MACs", least - 1, cost)])


def test_on_the_way_down_a_removed_branch_takes_what_is_in_it_along(monkeypatch):
    monkeypatch.setattr("tilecut_passes.search.MOST_OPTIONS", 3)
    groups = [group("branch", "layers", 1), group("inside", "neurons", 8), group("other", "neurons", 8)]
    # The branch is worth nothing, what is in it would be worth much.
    curves = {"branch": [0.0, 0.0], "other": [8.0 - k for k in range(9)]}
    curves["inside"] = [80.0 - 10 * k for k in range(9)]
    sizes = {"branch": [0, 1], "inside": [2, 4, 8], "other": [2, 4, 6, 8]}
    cost = lambda names, at: at["branch"] * at["inside"] + at["other"]
    within = {"branch": ["inside"]}
    found = search(groups, [["branch", "inside", "other"]], curves, sizes, [Limit("MACs", 8, cost)], within=within)
    assert found == {"branch": 0, "inside": 2, "other": 8}


def test_on_the_way_down_groups_stay_alike_in_branches_that_go(monkeypatch):
    monkeypatch.setattr("tilecut_passes.search.MOST_OPTIONS", 3)
    names = [f"i{n}" for n in range(4)]
    groups = [*(group(f"b{n}", "layers", 1) for n in range(4)), *(group(n, "neurons", 64) for n in names)]
    curves = {g.name: [5.0, 0.0] if g.kind == "layers" else [64.0 - k for k in range(65)] for g in groups}
    sizes = {g.name: [0, 1] if g.kind == "layers" else [4, 32, 64] for g in groups}
    within = {f"b{n}": [f"i{n}"] for n in range(4)}
    cost = lambda _, at: sum(at[f"b{n}"] * at[f"i{n}"] for n in range(4))
    for budget in (12, 70, 130, 200):
        found = search(
            groups, [[g.name for g in groups]], curves, sizes, [Limit("MACs", budget, cost)], [names], within=within
        )
        assert cost(None, found) <= budget
        assert len({found[n] for n in names}) == 1


def test_on_the_way_down_groups_stay_alike(monkeypatch):
    monkeypatch.setattr("tilecut_passes.search.MOST_OPTIONS", 3)
    groups, curves, sizes, cost = chain(4, 16)
    names = [g.name for g in groups]
    found = search(groups, [names], curves, sizes, [Limit("MACs", 600, cost)], alike=[["g0", "g3"]])
    assert found["g0"] == found["g3"]
    assert cost(names, found) <= 600
