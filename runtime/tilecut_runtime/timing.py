"""Time several things fairly on one machine: interleaved rounds, medians, CPU time beside wall time.

A machine's speed drifts with its neighbours and its clock; a round runs each contender once, so the drift hits all
alike and their ratios hold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# What reports call the artifact and the floor of its latency among the contenders.
PRUNED, FLOOR = "pruned artifact", "pruned, products alone"
# Threads of a pool wait actively for a while after a run, on the cores that the next contender's threads want.
SETTLE = 0.05


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender: medians of CPU and wall time, and the 95th percentiles of wall and CPU time."""

    cpu_ms: float
    wall_ms: float
    p95_ms: float
    cpu_p95_ms: float
    rounds: int


def clock(threads: int) -> str:
    """Which time a latency is: CPU time on one thread, which other work on the machine disturbs least; else wall time."""
    return "cpu" if threads == 1 else "wall"


def settle_of(threads: int) -> float:
    """How long contenders with so many threads should wait for each other, where some of their pools wait actively."""
    return SETTLE if threads > 1 else 0.0


def latency_ms(timing: Timing, threads: int) -> float:
    """A timing as a latency."""
    return timing.cpu_ms if clock(threads) == "cpu" else timing.wall_ms


def time_interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    warmup: int = 3,
    progress: Callable[[int, int], None] | None = None,
    *,
    settle: float = 0.0,
) -> dict[str, Timing]:
    """Run every contender once a round, for `rounds` counted rounds after `warmup` that are not counted.

    Each starts `settle` seconds after the one before; see `settle_of`.
    """
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, run in contenders.items():
            if settle:
                time.sleep(settle)
            start_cpu, start = time.process_time(), time.perf_counter()
            run()
            end, end_cpu = time.perf_counter(), time.process_time()
            if i >= warmup:
                cpu[name].append(1e3 * (end_cpu - start_cpu))
                wall[name].append(1e3 * (end - start))
        if progress is not None:
            progress(i + 1, warmup + rounds)

    def one(name: str) -> Timing:
        return Timing(
            statistics.median(cpu[name]),
            statistics.median(wall[name]),
            _percentile_95(wall[name]),
            _percentile_95(cpu[name]),
            rounds,
        )

    return {name: one(name) for name in contenders}


def _percentile_95(times: Sequence[float]) -> float:
    return sorted(times)[min(len(times) - 1, int(0.95 * len(times)))]
