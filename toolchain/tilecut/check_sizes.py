"""Run a captured model at its smallest and its longest sizes before anything is built on them.

A config may promise more positions than the model has rows for (RoBERTa keeps two of its 514 for itself), a model without
a config promises nothing, and an export may hold a size for dynamic that the code cannot take. The first two set the
limit, with a note; the last is an error.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tilecut.make_bounds import find_bounds
from tilecut.make_cases import make_inputs
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import CaptureError, first_line

# A model without positions may allow lengths that no one wants to wait for.
LONGEST = 1024


def check_sizes(graph: Graph, model: str) -> None:
    """Lower the limits of `graph.ranges` to what runs.

    Raises:
        CaptureError: the model does not run at its smallest sizes.
    """
    rows = graph.row_sizes()
    smallest = max((r.min for name, r in graph.ranges.items() if name not in rows), default=1)
    if failure := _failure(graph, smallest):
        raise CaptureError(
            model,
            f"the captured model does not run at its smallest sizes, {smallest} in every dynamic dimension",
            got=first_line(failure),
            fix="fix that size: pass dynamic_shapes without it",
        )
    limits = {name: r.max for name, r in graph.ranges.items() if name not in rows}
    if not limits:
        return
    longest = max(LONGEST if most is None else most for most in limits.values())
    if longest > LONGEST or not _failure(graph, longest):
        return
    runs, fails = smallest, longest
    while fails - runs > 1:
        middle = (runs + fails) // 2
        runs, fails = (runs, middle) if _failure(graph, middle) else (middle, fails)
    for name, limit in limits.items():
        if limit is None or limit > runs:
            graph.ranges[name] = replace(graph.ranges[name], max=runs)
            said = "" if limit is None else f"; the config says {limit}, but the model fails beyond"
            graph.notes.append(f"capture: {name} is at most {runs}{said}")


def _failure(graph: Graph, length: int) -> Exception | None:
    """What running one row of `length` raises; ids are the last of their table, so that none is taken for padding."""
    made, bounds = make_inputs(graph, 1, length, seed=0, ragged=False), find_bounds(graph)
    inputs = {name: value if name in bounds else _last(value) for name, value in made.items()}
    try:
        graph.run(inputs)
    except (RuntimeError, IndexError) as e:
        return e
    return None


def _last(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.max().expand_as(value).clone()
