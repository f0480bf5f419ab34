"""A cost model's arithmetic: interpolation, sums, the fit to whole models, and its file."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilecut_runtime.errors import ConfigError
from tilecut_runtime.timing import Timing
from tilecut_targets.cost_model import CostModel, LayerTable, clock, fit, latency_ms, make_monotone

HEADS = LayerTable(["heads"], [[1, 4, 12]], [1.0, 2.5, 6.5], "h")
GROUPED = LayerTable(["kv_groups", "queries"], [[1, 4], [1, 2, 4]], [[1.0, 1.5, 2.5], [3.0, 5.0, 9.0]], "g")
LAYERS = (
    (("a:heads",), HEADS),
    (("b:heads",), HEADS),
    (("c:kv_groups", "c:queries"), GROUPED),
)
SIZES = {"a:heads": 4, "b:heads": 12, "c:kv_groups": 4, "c:queries": 2}


def rising(shape, seed):
    values = np.random.default_rng(seed).random(shape)
    for axis in range(values.ndim):
        values = np.cumsum(values, axis)
    return values


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(0, 999))
def test_a_table_is_exact_on_its_grid_and_linear_between(kinds, seed):
    rng = np.random.default_rng(seed)
    grid = [sorted(rng.choice(100, size=rng.integers(1, 5), replace=False).tolist()) for _ in range(kinds)]
    values = rising([len(sizes) for sizes in grid], seed)
    table = LayerTable([f"kind{i}" for i in range(kinds)], grid, values)
    for index in itertools.product(*(range(len(sizes)) for sizes in grid)):
        assert table.at([sizes[i] for sizes, i in zip(grid, index)]) == pytest.approx(values[index], rel=1e-12)
    first = grid[0]
    for a, b in itertools.pairwise(first):
        rest = [sizes[0] for sizes in grid[1:]]
        got = table.at([(a + b) / 2, *rest])  # type: ignore[list-item]
        assert got == pytest.approx((table.at([a, *rest]) + table.at([b, *rest])) / 2)


@settings(max_examples=30)
@given(st.integers(0, 9999))
def test_more_units_never_cost_less_whatever_the_noise(seed):
    rng = np.random.default_rng(seed)
    grid = [[1, 3, 5, 8], [16, 64, 128]]
    table = LayerTable(["heads", "neurons"], grid, rising([4, 3], seed) + rng.normal(0, 3, [4, 3]))
    for a, b in [(1, 2), (2, 5), (5, 8)]:
        for n in (16, 40, 128):
            assert table.at([a, n]) <= table.at([b, n]) + 1e-12
    for a, b in [(16, 17), (60, 100)]:
        assert table.at([4, a]) <= table.at([4, b]) + 1e-12


def test_noise_is_averaged_and_monotone_values_stay():
    values = np.array([[1.0, 2.0, 4.0], [2.0, 3.0, 5.0]])
    assert np.array_equal(make_monotone(values), values)
    # The two that are the wrong way round share their mean: neither is believed.
    assert np.allclose(make_monotone(np.array([1.0, 4.0, 3.0, 5.0])), [1.0, 3.5, 3.5, 5.0])


def test_a_size_that_was_not_measured_is_refused():
    for size in (0, 13):
        with pytest.raises(ConfigError, match=rf"no times of {size} heads; wanted 1 to 12"):
            HEADS.at([size])


def test_costs_add_up_and_are_scaled():
    model = CostModel("ms", 0.5, 2.0, LAYERS)
    assert model.of(["a:heads"], SIZES) == 2 * 2.5
    assert model.of(["c:queries", "c:kv_groups"], SIZES) == 2 * 5.0
    # Several sets at once cost what they cost one by one.
    assert model.of(["b:heads", "a:heads"], SIZES) == 2 * (2.5 + 6.5)
    assert model.total(SIZES) == 0.5 + sum(model.of(names, SIZES) for names, _ in LAYERS) == 0.5 + 2 * (2.5 + 6.5 + 5)


@pytest.mark.parametrize("names", [["c:queries"], ["a:heads", "x:neurons"]])
def test_a_part_of_a_set_has_no_cost(names):
    with pytest.raises(ConfigError, match=rf"a group without its set; got {names[-1]}"):
        CostModel("ms", 0.0, 1.0, LAYERS).of(names, {**SIZES, "x:neurons": 1})


def runs(model, counts):
    return [(f"run {i}", sizes, model.total(sizes)) for i, sizes in enumerate(counts)]


CUTS = [
    SIZES,
    {"a:heads": 12, "b:heads": 12, "c:kv_groups": 4, "c:queries": 4},
    {"a:heads": 1, "b:heads": 2, "c:kv_groups": 1, "c:queries": 1},
    {"a:heads": 7, "b:heads": 3, "c:kv_groups": 2, "c:queries": 4},
]


def test_a_fit_finds_the_model_that_made_the_runs():
    true = CostModel("ms", 0.7, 0.9, LAYERS)
    found = fit(LAYERS, runs(true, CUTS), {"threads": 1})
    assert (found.rest, found.factor) == pytest.approx((0.7, 0.9))
    assert found.worst < 1e-9 and found.notes == ()
    assert [c.predicted for c in found.checks] == pytest.approx([true.total(c) for c in CUTS])


def test_a_prediction_is_made_without_the_run_that_it_is_compared_with():
    true = CostModel("ms", 0.7, 0.9, LAYERS)
    name, sizes, ms = (made := runs(true, CUTS))[1]
    made[1] = (name, sizes, 2 * ms)
    found = fit(LAYERS, made, {})
    assert found.checks[1].predicted == pytest.approx(ms) and found.checks[1].ratio == pytest.approx(0.5)
    assert found.worst == max(abs(c.ratio - 1) for c in found.checks) > 0.4
    # It says so, with the figures, where a report will show it.
    (note,) = found.notes
    assert "misses a whole model by" in note and "measure on a quiet machine" in note


def test_neither_part_of_a_fit_is_negative():
    # Alone the layers take longer than the whole models that hold them: no time is left for the rest.
    found = fit(LAYERS, [("a", CUTS[1], 3.0), ("b", CUTS[2], 0.1)], {})
    assert found.rest == 0.0 and found.factor > 0


def test_a_model_survives_its_file():
    made = fit(LAYERS, runs(CostModel("ms", 0.7, 0.9, LAYERS), CUTS), {"processor": "x"})
    read = CostModel.from_json(json.loads(json.dumps(made.as_json())))
    assert read.as_json() == made.as_json()
    for sizes in CUTS:
        assert read.total(sizes) == made.total(sizes)
    held = made.as_json()
    assert [t["layers"] for t in held["layer_types"]] == [[["a:heads"], ["b:heads"]], [["c:kv_groups", "c:queries"]]]
    assert {"name", "measured", "predicted", "ratio", "sizes"} == held["validation"][0].keys()


def test_a_latency_is_cpu_time_on_one_thread_and_wall_time_on_more():
    timing = Timing(cpu_ms=3.0, wall_ms=2.0, p95_ms=9.0, cpu_p95_ms=9.0, rounds=1)
    assert (clock(1), latency_ms(timing, 1)) == ("cpu", 3.0)
    assert (clock(2), latency_ms(timing, 2)) == ("wall", 2.0)
