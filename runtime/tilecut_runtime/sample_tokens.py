"""Choose the next token of a row from its logits [V]: the most likely one, or one drawn by temperature, top-k and top-p.

In this order: logits of tokens that the row holds are made smaller (repetition penalty: Keskar et al., CTRL, arXiv 1909.05858),
divided by the temperature, cut to the k largest, cut to the most likely that together have probability p (Holtzman et al.,
arXiv 1904.09751).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilecut_runtime.errors import InputError

WHERE = "Session.generate"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; see `Session.generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(
            "temperature",
            self.temperature,
            _is_number(self.temperature) and self.temperature >= 0,
            "a number from 0 on",
        )
        _check(
            "top_k",
            self.top_k,
            self.top_k is None or (is_count(self.top_k) and self.top_k > 0),
            "a positive integer or None",
        )
        top_p = self.top_p
        _check(
            "top_p",
            top_p,
            top_p is None or (_is_number(top_p) and 0 < top_p <= 1),
            "a number above 0, at most 1, or None",
        )
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, _is_number(penalty) and penalty > 0, "a positive number")
        _check("seed", self.seed, self.seed is None or is_count(self.seed), "an integer from 0 on, or None")
        if not self.temperature and (self.top_k is not None or self.top_p is not None):
            raise InputError(
                WHERE,
                "top_k and top_p choose among draws, and temperature 0 draws nothing",
                fix="give temperature=1.0, say",
            )

    def draws(self, rows: int) -> list[np.random.Generator]:
        """A source of randomness for every row, of its own."""
        entropy = np.random.SeedSequence(self.seed).entropy
        assert isinstance(entropy, int)
        return [np.random.default_rng([entropy, row]) for row in range(rows)]

    def choose(self, logits: np.ndarray, held: np.ndarray, draw: np.random.Generator) -> int:
        """The next token of a row that holds the ids `held`."""
        if self.repetition_penalty != 1:
            logits, held = logits.copy(), np.unique(held)
            found = logits[held]
            logits[held] = np.where(found > 0, found / self.repetition_penalty, found * self.repetition_penalty)
        if not self.temperature:
            return int(logits.argmax())
        # From the largest on: divided by a tiny temperature, the others are -inf and it stays 0.
        scores = logits.astype(np.float64)
        with np.errstate(over="ignore"):
            scores = (scores - scores.max()) / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            least = np.partition(scores, -self.top_k)[-self.top_k]
            scores = np.where(scores < least, -np.inf, scores)
        weights = np.exp(scores - scores.max())
        if self.top_p is not None and self.top_p < 1:
            weights = _nucleus(weights, self.top_p)
        sums = weights.cumsum()
        return int(np.searchsorted(sums, draw.random() * sums[-1], side="right").clip(max=len(sums) - 1))


def _nucleus(weights: np.ndarray, share: float) -> np.ndarray:
    """The fewest largest weights that together are `share` of all, the others 0."""
    order = np.argsort(-weights, kind="stable")
    sums = weights[order].cumsum()
    kept = int(np.searchsorted(sums, share * sums[-1], side="left")) + 1
    out = np.zeros_like(weights)
    out[order[:kept]] = weights[order[:kept]]
    return out


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 0 on, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: Any, fits: bool, wanted: str) -> None:
    if not fits:
        raise InputError(WHERE, f"{name} does not fit", got=repr(value), wanted=wanted)
