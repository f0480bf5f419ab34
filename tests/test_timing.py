"""Interleaved timing: who runs when, and how often. Nothing here looks at a clock."""

import math
from types import SimpleNamespace

import pytest

from tilecut_runtime.timing import SETTLE, Timing, settle_of, time_interleaved


def test_a_round_runs_every_contender_once_in_order():
    calls = []
    time_interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=2)
    assert "".join(calls) == "abc" * 5


def test_warmup_rounds_are_run_and_not_counted():
    calls = []
    timed = time_interleaved({"a": lambda: calls.append(1)}, rounds=4, warmup=3)
    assert len(calls) == 7
    assert timed["a"].rounds == 4


def test_progress_counts_every_round():
    steps = []
    time_interleaved({"a": int, "b": int}, rounds=2, warmup=1, progress=lambda done, of: steps.append((done, of)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("rounds", [1, 2, 20])
def test_every_contender_has_finite_figures_and_a_tail_no_shorter_than_the_median(rounds):
    timed = time_interleaved({"idle": int, "busy": lambda: sum(range(1000))}, rounds=rounds)
    assert list(timed) == ["idle", "busy"]
    for timing in timed.values():
        assert isinstance(timing, Timing)
        assert all(math.isfinite(x) and x >= 0 for x in (timing.cpu_ms, timing.wall_ms, timing.p95_ms))
        assert timing.p95_ms >= timing.wall_ms


def test_the_figures_are_medians_and_a_percentile_of_the_counted_rounds(monkeypatch):
    # A clock that says that round i took i seconds, CPU time half of it.
    seconds = iter(x for i in range(101) for x in (0.0, float(i)))
    halves = iter(x for i in range(101) for x in (0.0, i / 2))
    clock = SimpleNamespace(perf_counter=lambda: next(seconds), process_time=lambda: next(halves))
    monkeypatch.setattr("tilecut_runtime.timing.time", clock)
    timed = time_interleaved({"a": int}, rounds=100, warmup=1)["a"]
    assert timed == Timing(cpu_ms=25_250.0, wall_ms=50_500.0, p95_ms=96_000.0, cpu_p95_ms=48_000.0, rounds=100)


def test_a_contender_that_fails_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        time_interleaved({"a": int, "b": lambda: 1 / 0})


@pytest.mark.parametrize(("threads", "pauses"), [(1, 0), (2, 6)])
def test_contenders_with_threads_wait_until_those_before_are_asleep(threads, pauses, monkeypatch):
    slept = []
    monkeypatch.setattr("tilecut_runtime.timing.time.sleep", slept.append)
    time_interleaved({"a": int, "b": int}, rounds=2, warmup=1, settle=settle_of(threads))
    assert slept == [SETTLE] * pauses
