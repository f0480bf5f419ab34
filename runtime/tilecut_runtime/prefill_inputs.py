"""The inputs with which a model with a key-value cache reads whole texts: empty caches, which just hold them or grow."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tilecut_runtime.cache_layout import BEAMS, LENGTHS, MASK, PAST_LENGTHS, POSITIONS
from tilecut_runtime.manifest import Manifest


def prefill_inputs(
    manifest: Manifest,
    tokens: np.ndarray,
    lengths: np.ndarray | None = None,
    encoded: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Inputs by name for tokens [B, S], right-padded behind lengths [B]; None: none is padding. `encoded`: the encoder's."""
    layout = manifest.generation
    assert layout is not None
    batch, length = tokens.shape
    if layout.stateful:
        given = np.full(batch, length, np.int64) if lengths is None else lengths
        place = np.arange(length) - (length - given)[:, None]
        return {
            layout.tokens: np.take_along_axis(tokens, np.maximum(place, 0), 1),
            MASK: (place >= 0).astype(np.int64),
            POSITIONS: np.maximum(place, 0),
            BEAMS: np.arange(batch, dtype=np.int32),
        }
    out = {
        layout.tokens: tokens,
        PAST_LENGTHS: np.zeros(batch, np.int64),
        LENGTHS: np.full(batch, length, np.int64) if lengths is None else lengths,
        **(encoded or {}),
    }
    for spec in manifest.inputs:
        if spec.name in layout.states:
            out[spec.name] = np.zeros((batch, int(spec.shape[1]), length, int(spec.shape[3])), spec.dtype)
    return out
