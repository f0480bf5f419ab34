"""What a target's cost model is: tables of measured times, one a type of layer, that add up to the time of a model.

    time of a model = rest + sum over its layers of factor x table(sizes)

A table holds the time of one layer at a grid of sizes; between them it is linear in every size, and never falls when a
size grows. `rest` and `factor` are fitted to whole models (`fit`), since a layer inside a model costs a little less or
more than alone. Every whole model is then predicted from the others: those errors are the model's validation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import isotonic_regression, nnls

from tilecut_runtime.errors import ConfigError
from tilecut_runtime.timing import clock, latency_ms

# Which time counts belongs to every cost model, and is defined where time is measured.
__all__ = ["CALCULATED", "Check", "CostModel", "LayerTable", "clock", "fit", "latency_ms", "make_monotone"]

# The validation error above which the model says that it is not to be trusted.
TRUSTED = 0.10
# The clock of a model that nothing was measured for.
CALCULATED = "calculated"


class LayerTable:
    """Times of one type of layer: `ms[i, j, ..]` at sizes `grid[0][i], grid[1][j], ..` of groups of `kinds`."""

    def __init__(
        self, kinds: Sequence[str], grid: Sequence[Sequence[int]], ms: np.ndarray | Sequence[Any], signature: str = ""
    ):
        self.kinds, self.signature = tuple(kinds), signature
        self.grid = tuple(tuple(sizes) for sizes in grid)
        self.ms = make_monotone(np.asarray(ms, dtype=float))
        self._interpolate = RegularGridInterpolator(*_widened(self.grid, self.ms))

    def at(self, sizes: Sequence[int]) -> float:
        """The time at some sizes, linear between those of the grid.

        Raises:
            ConfigError: a size outside of the grid.
        """
        for kind, size, known in zip(self.kinds, sizes, self.grid, strict=True):
            if not known[0] <= size <= known[-1]:
                raise ConfigError(
                    "cost model", f"no times of {size} {kind}", wanted=f"{known[0]} to {known[-1]}", fix="measure again"
                )
        return float(self._interpolate(sizes)[0])


@dataclass(frozen=True)
class Check:
    """A whole model that was measured, and its time as predicted from the other ones."""

    name: str
    sizes: dict[str, int]
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


@dataclass(frozen=True)
class CostModel:
    """What a run costs, as a function of how many units each group has after padding.

    Attributes:
        unit: of every figure.
        rest: what no group takes part in.
        factor: how much of a layer's time alone it takes inside a model.
        layers: the sets of groups that share contractions, each with its table.
        checks: whole models, measured and predicted.
        facts: where and how it was measured.
        notes: what the reader of a report should know.
    """

    unit: str
    rest: float
    factor: float
    layers: tuple[tuple[tuple[str, ...], LayerTable], ...]
    checks: tuple[Check, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, names: Sequence[str], sizes: Mapping[str, int]) -> float:
        """The cost of one or several whole sets of groups at legal, padded sizes.

        Raises:
            ConfigError: names that are no whole sets, or a size that was not measured.
        """
        wanted = set(names)
        met = [(groups, table) for groups, table in self.layers if wanted.issuperset(groups)]
        if left := wanted.difference(*(groups for groups, _ in met)):
            raise ConfigError("cost model", "a group without its set", got=sorted(left)[0])
        return self.factor * sum(table.at([sizes[name] for name in groups]) for groups, table in met)

    def total(self, sizes: Mapping[str, int]) -> float:
        """The cost of the whole model."""
        return self.rest + sum(self.of(groups, sizes) for groups, _ in self.layers)

    @property
    def worst(self) -> float:
        """The largest relative error of a whole model's prediction."""
        return max((abs(check.ratio - 1) for check in self.checks), default=0.0)

    def as_json(self) -> dict[str, Any]:
        """The model for the report and for its file."""
        tables = {id(table): table for _, table in self.layers}
        return {
            "unit": self.unit,
            "rest": self.rest,
            "factor": self.factor,
            "layer_types": [
                {
                    "signature": table.signature,
                    "kinds": list(table.kinds),
                    "layers": [list(groups) for groups, own in self.layers if own is table],
                    "grid": [list(sizes) for sizes in table.grid],
                    "ms": table.ms.tolist(),
                }
                for table in tables.values()
            ],
            "validation": [
                {
                    "name": c.name,
                    "sizes": c.sizes,
                    "measured": c.measured,
                    "predicted": c.predicted,
                    "ratio": c.ratio,
                }
                for c in self.checks
            ],
            "worst_error": self.worst,
            "facts": dict(self.facts),
            "notes": list(self.notes),
        }

    @staticmethod
    def from_json(held: Mapping[str, Any]) -> CostModel:
        """A model from what `as_json` returned; raises KeyError, TypeError or ValueError where that is damaged."""
        layers = []
        for t in held["layer_types"]:
            table = LayerTable(t["kinds"], t["grid"], t["ms"], t["signature"])
            layers += [(tuple(groups), table) for groups in t["layers"]]
        return CostModel(
            held["unit"],
            float(held["rest"]),
            float(held["factor"]),
            tuple(layers),
            tuple(
                Check(c["name"], dict(c["sizes"]), float(c["measured"]), float(c["predicted"]))
                for c in held["validation"]
            ),
            dict(held["facts"]),
            tuple(held["notes"]),
        )


def fit(
    layers: Sequence[tuple[tuple[str, ...], LayerTable]],
    runs: Sequence[tuple[str, Mapping[str, int], float]],
    facts: Mapping[str, Any],
) -> CostModel:
    """The model whose `rest` and `factor` fit whole models best: least squares of relative errors, neither negative.

    Args:
        runs: name, sizes and milliseconds of whole models; two or more of different sizes.
    """
    alone = CostModel("ms", 0.0, 1.0, tuple(layers))
    sums = np.array([alone.total(sizes) for _, sizes, _ in runs])
    measured = np.array([ms for _, _, ms in runs])
    checks = []
    for i, (name, sizes, ms) in enumerate(runs):
        others = np.arange(len(runs)) != i
        # Runs of one size tell nothing of another: a model with two legal sizes has no run to spare.
        if len(set(sums[others])) < 2:
            others[i] = True
        rest, factor = _rest_and_factor(sums[others], measured[others])
        checks.append(Check(name, dict(sizes), ms, rest + factor * float(sums[i])))
    rest, factor = _rest_and_factor(sums, measured)
    made = CostModel("ms", rest, factor, tuple(layers), tuple(checks), facts)
    if made.worst <= TRUSTED:
        return made
    odd = max(checks, key=lambda c: abs(c.ratio - 1))
    note = (
        f"latency: the cost model misses a whole model by {abs(odd.ratio - 1):.0%} ({odd.name}: predicted "
        f"{odd.predicted:.3g} ms, measured {odd.measured:.3g} ms); measure on a quiet machine"
    )
    return CostModel("ms", rest, factor, tuple(layers), tuple(checks), facts, (note,))


def make_monotone(values: np.ndarray) -> np.ndarray:
    """The values with noise removed that would make a larger layer cheaper: isotonic regression along every axis."""
    for axis in range(values.ndim):
        values = np.apply_along_axis(lambda row: isotonic_regression(row).x, axis, values)
    # One axis at a time may leave an inversion along another.
    for axis in range(values.ndim):
        values = np.maximum.accumulate(values, axis=axis)
    return values


def _widened(grid: Sequence[Sequence[int]], values: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """A grid with two sizes at least along every axis, which the interpolator wants."""
    points = []
    for axis, sizes in enumerate(grid):
        if len(sizes) == 1:
            values = np.repeat(values, 2, axis=axis)
        points.append(np.array([*sizes, sizes[0] + 1] if len(sizes) == 1 else sizes, dtype=float))
    return points, values


def _rest_and_factor(sums: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    weighted = np.stack([np.ones_like(sums), sums], 1) / measured[:, None]
    (rest, factor), _ = nnls(weighted, np.ones_like(measured))
    return float(rest), float(factor)
