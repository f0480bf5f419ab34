"""The inputs with which a model with a key-value cache reads whole texts: empty caches that just hold them."""

from __future__ import annotations

import numpy as np

from tilecut_runtime.cache_layout import LENGTHS, PAST_LENGTHS
from tilecut_runtime.manifest import Manifest


def prefill_inputs(manifest: Manifest, tokens: np.ndarray, lengths: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Inputs by name for tokens [B, S], right-padded behind lengths [B]; None: none is padding."""
    layout = manifest.generation
    assert layout is not None
    batch, length = tokens.shape
    out = {
        layout.tokens: tokens,
        PAST_LENGTHS: np.zeros(batch, np.int64),
        LENGTHS: np.full(batch, length, np.int64) if lengths is None else lengths,
    }
    for spec in manifest.inputs:
        if spec.name in layout.states:
            out[spec.name] = np.zeros((batch, int(spec.shape[1]), length, int(spec.shape[3])), spec.dtype)
    return out
