"""The general text that tilecut ships (WordNet glosses, `data/LICENSE-general.md`), and how much of it is mixed in.

A refit on in-domain text alone forgets other text, so a part of what is fitted is general: `mixture` of the tokens, which
is what a least-squares fit weighs. Passages are mixed in as they are, one to six glosses each: text longer than the
caller's keeps the later positions right. Every sixteenth passage is held out to measure fidelity on, whatever the seed: it
is never fitted.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TypeVar

Row = TypeVar("Row")

GENERAL = "general texts (WordNet glosses, shipped with tilecut)"
HELD_OUT_EVERY = 16
# Fraction of the fitted tokens that is general text, unless the caller says otherwise.
MIXTURE = 0.2


@functools.cache
def general_passages() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Passages to fit with, and passages that are held out."""
    lines = (resources.files("tilecut.data") / "general.txt").read_text(encoding="utf-8").splitlines()
    held = lines[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return tuple(line for i, line in enumerate(lines) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2), tuple(held)


def mixed_in(rows: Sequence[Row], tokens: Callable[[Row], int], own: int, mixture: float, seed: int) -> list[Row]:
    """Rows at random, until they make `mixture` of all tokens beside `own` others, or all are taken."""
    wanted = own * mixture / (1 - mixture)
    chosen, taken = [], 0
    for row in random.Random(seed).sample(rows, len(rows)):
        # The row that takes the sum farther from what is wanted is left out.
        if taken + tokens(row) / 2 > wanted:
            break
        chosen.append(row)
        taken += tokens(row)
    return chosen
