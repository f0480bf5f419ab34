"""Latency before and after, on this machine: the artifact against the dense model in the same runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilecut.make_cases import make_inputs
from tilecut_passes.graph import Graph
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.timing import FLOOR, PRUNED, settle_of, time_interleaved
from tilecut_targets.cost_model import clock, latency_ms
from tilecut_targets.target import Target

ROUNDS, WARMUP = 30, 3


def measure_latency(
    target: Target,
    dense: Graph,
    pruned: Graph,
    folder: Path,
    manifest: Manifest,
    at: dict[str, int],
    scratch: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Interleaved medians at the sizes of `at`, on `at["threads"]` threads.

    `clock` says which of the times is the latency, as `max_latency_ms` means it; `times_floor` how many times as long the
    artifact takes as the pruned model's matrix products alone.
    A target whose runtime is not on this machine is reported as not run, never guessed.
    """
    if dense.states:
        return {"status": "not run", "why": "a pruned key-value cache is another input than the dense model's"}
    threads = at.get("threads", 1)
    contenders = target.contenders(dense, folder, manifest, threads, scratch)
    if contenders is None:
        return {"status": "not run", "why": f"the {target} target's device is not on this machine"}
    inputs = make_inputs(dense, at.get("batch", 1), at.get("sequence", 128), seed=5, ragged=False)
    arrays: dict[str, np.ndarray] = {k: v.numpy() for k, v in inputs.items()}
    runs: dict[str, Callable[[], object]] = {
        name: (lambda run=run: run(arrays)) for name, run in contenders.runners.items()
    }
    if (floor := target.floor(pruned, at, scratch)) is not None:
        runs[FLOOR] = lambda: floor(arrays)
    runs["dense, torch eager"] = lambda: dense.run(inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        timings = time_interleaved(runs, ROUNDS, WARMUP, progress, settle=settle_of(threads))
    finally:
        torch.set_num_threads(before)
    ms = {name: latency_ms(t, threads) for name, t in timings.items()}
    return {
        "status": "measured",
        "at": dict(at),
        "clock": clock(threads),
        "rounds": ROUNDS,
        "failed": contenders.failed,
        "times_floor": round(ms[PRUNED] / ms[FLOOR], 3) if FLOOR in ms else None,
        "contenders": {
            name: {
                "cpu_ms": round(t.cpu_ms, 3),
                "wall_ms": round(t.wall_ms, 3),
                "p95_ms": round(t.p95_ms, 3),
                "times_pruned": round(ms[name] / ms[PRUNED], 3),
            }
            for name, t in timings.items()
        },
    }
