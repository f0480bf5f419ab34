"""The inputs with which a model with a key-value cache reads whole texts: empty caches, which just hold them or grow."""

from __future__ import annotations

import numpy as np

from tilecut_runtime.cache_layout import BEAMS, LENGTHS, MASK, PAST_LENGTHS, POSITIONS
from tilecut_runtime.manifest import Manifest


def prefill_inputs(manifest: Manifest, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs by name for tokens [B, S] without padding; those of an encoder are left out."""
    layout = manifest.generation
    assert layout is not None
    batch, length = tokens.shape
    if layout.stateful:
        return {
            layout.tokens: tokens,
            MASK: np.ones((batch, length), np.int64),
            POSITIONS: np.tile(np.arange(length), (batch, 1)),
            BEAMS: np.arange(batch, dtype=np.int32),
        }
    out = {
        layout.tokens: tokens,
        PAST_LENGTHS: np.zeros(batch, np.int64),
        LENGTHS: np.full(batch, length, np.int64),
    }
    for spec in manifest.inputs:
        if spec.name in layout.states:
            out[spec.name] = np.zeros((batch, int(spec.shape[1]), length, int(spec.shape[3])), spec.dtype)
    return out
