"""Warn when there are few tokens for the widths that a refit has to determine.

A least-squares fit of a layer with W inputs determines W numbers an output from as many equations as there are tokens. It
needs many times W of them before what it fits is the layer and not the sample (figures in docs/calibration.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from tilecut.load_calibration import Calibration

TOKENS_PER_INPUT = 20


def check_tokens(calibration: Calibration, widths: Mapping[str, int]) -> list[str]:
    """A warning, and the same as a note for the report, when the widest refitted layer has too few tokens.

    Args:
        widths: how many inputs each refitted layer keeps, by name.
    """
    name = max(widths, key=lambda layer: widths[layer], default="")
    if not name or calibration.tokens >= TOKENS_PER_INPUT * widths[name]:
        return []
    note = (
        f"few calibration data: {calibration.tokens} tokens or rows to refit {name} with, which keeps {widths[name]} "
        f"inputs; at least {TOKENS_PER_INPUT * widths[name]} are wanted: give more texts or batches"
    )
    warnings.warn(note, UserWarning, stacklevel=3)
    return [note]
