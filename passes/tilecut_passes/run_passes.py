"""Run passes over a graph; the only place that cleans up, re-propagates shapes, times, logs and checks numbers.

A pass is a callable with a name: it rewrites the graph in place and returns how many rewrites it made. It need not
remove dead code, lint, recompile or set `meta["val"]`: that happens here, after each pass that rewrote something.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tilecut_passes.graph import Graph
from tilecut_runtime.errors import VerificationError
from tilecut_runtime.reference import scaled_error

log = logging.getLogger("tilecut.passes")


@runtime_checkable
class Pass(Protocol):
    """A graph rewrite: in place, idempotent, returns the number of rewrites."""

    def __call__(self, graph: Graph) -> int:
        """Rewrite the graph; returns the number of rewrites."""
        ...


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its name, rewrites, and seconds with the clean-up."""

    name: str
    rewrites: int
    seconds: float


def run_passes(
    graph: Graph, passes: Sequence[Pass], check: Mapping[str, Tensor] | None = None, limit: float = 1e-4
) -> list[PassRecord]:
    """Run `passes` in order.

    Args:
        check: inputs on which the graph must give the same outputs before and after every pass; None checks nothing.
        limit: the largest difference allowed, relative to the output's largest magnitude.

    Raises:
        VerificationError: a pass changed the numbers.
    """
    records = []
    before = graph.run(check) if check is not None else None
    for one in passes:
        name = type(one).__name__
        start = time.perf_counter()
        rewrites = one(graph)
        if rewrites:
            graph.clean()
            graph.propagate()
        records.append(PassRecord(name, rewrites, time.perf_counter() - start))
        log.debug("%s: %d rewrites", name, rewrites)
        if check is not None and before is not None and rewrites:
            after = graph.run(check)
            error = largest_error(before, after)
            if not error <= limit:
                raise VerificationError(
                    name,
                    "the pass changed the model's outputs",
                    got=f"relative error {error:.2e}",
                    wanted=f"at most {limit:.0e}",
                )
            before = after
    return records


def largest_error(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float:
    """The largest difference of any output, each floating one as `scaled_error` sees it; inf for another shape."""
    worst = 0.0
    for name, a in want.items():
        b = got[name]
        if a.shape != b.shape:
            return float("inf")
        if not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        worst = max(worst, scaled_error(*(x.detach().double().cpu().numpy() for x in (a, b))))
    return worst
