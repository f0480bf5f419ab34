"""Steps of a model whose cache OpenVINO holds: rows padded on the left, one infer request for every batch of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tilecut_runtime.cache_layout import BEAMS, MASK, POSITIONS, CacheLayout, check_room
from tilecut_runtime.errors import InputError, first_line
from tilecut_runtime.manifest import Manifest

if TYPE_CHECKING:
    import openvino


class OpenVinoDecoder:
    """A compiled model that prefills prompts and decodes tokens."""

    def __init__(self, compiled: openvino.CompiledModel, manifest: Manifest, layout: CacheLayout):
        self.compiled, self.layout = compiled, layout
        self.dtype = next(spec.dtype for spec in manifest.inputs if spec.name == layout.tokens)
        self.vocabulary = int(next(spec.shape[-1] for spec in manifest.outputs if spec.name == layout.logits))

    def start(self, batch: int, capacity: int, encoded: object = None) -> Decoding:
        """A batch of empty caches that may grow to `capacity` tokens a row."""
        assert encoded is None
        return Decoding(self, batch, capacity)


class Decoding:
    """The caches of one batch and how far each row has come."""

    def __init__(self, decoder: OpenVinoDecoder, batch: int, capacity: int):
        self.decoder, self.capacity = decoder, capacity
        self.past = np.zeros(batch, np.int64)
        # Which columns of the cache hold a row's own tokens.
        self.mask = np.zeros((batch, 0), np.int64)
        self.read = self.past
        self.request: Any = decoder.compiled.create_infer_request()

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read tokens [B, S], of which the first lengths [B] are real; the logits [B, V] behind each row's last one.

        `accept` moves the rows' pasts on.

        Raises:
            InputError: the caches are full, or OpenVINO cannot run the step.
        """
        check_room(self.past, lengths, self.capacity)
        batch, size = tokens.shape
        # Column of the padded row -> place among the row's own tokens; below 0 on the left of them.
        place = np.arange(size) - (size - lengths)[:, None]
        self.mask = np.concatenate((self.mask, (place >= 0).astype(np.int64)), 1)
        self.read = lengths
        given = {
            self.decoder.layout.tokens: np.take_along_axis(tokens, np.maximum(place, 0), 1).astype(self.decoder.dtype),
            MASK: self.mask,
            POSITIONS: np.maximum(self.past[:, None] + place, 0),
            BEAMS: np.arange(batch, dtype=np.int32),
        }
        # OpenVINO's own exceptions are RuntimeErrors.
        try:
            found = self.request.infer(given)
        except RuntimeError as e:
            raise InputError("Session.generate", f"openvino cannot run the model on these tokens: {first_line(e)}") from e
        return found[self.decoder.layout.logits][:, 0].copy()

    def accept(self, lengths: np.ndarray) -> None:
        """Keep the first so many tokens a row of what the last step read; no later one sees the others."""
        ends = self.mask.shape[1] - self.read + lengths
        self.mask[np.arange(self.mask.shape[1]) >= ends[:, None]] = 0
        self.past = self.past + lengths
