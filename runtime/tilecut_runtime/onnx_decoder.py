"""Steps of a model with a key-value cache in onnxruntime: one buffer a cache, read and written in place.

Past and present are bound to the same memory, so that a step copies no cache; what else a step needs lies in arrays that
are bound once and filled anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tilecut_runtime.cache_layout import LENGTHS, PAST_LENGTHS, CacheLayout, check_room
from tilecut_runtime.errors import InputError, first_line
from tilecut_runtime.manifest import Manifest

if TYPE_CHECKING:
    import onnxruntime

Arrays = Mapping[str, np.ndarray]


class OnnxDecoder:
    """A session that prefills prompts and decodes tokens."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest, layout: CacheLayout):
        self.session, self.layout = session, layout
        self.specs = {spec.name: spec for spec in manifest.inputs}
        logits = next(spec for spec in manifest.outputs if spec.name == layout.logits)
        self.vocabulary = int(logits.shape[-1])

    def start(self, batch: int, capacity: int, encoded: Arrays | None = None) -> Decoding:
        """A batch of empty caches that hold `capacity` tokens a row; `encoded` is what an encoder gave for it."""
        return Decoding(self, batch, capacity, encoded or {})


class Decoding:
    """The caches of one batch and how far each row has come."""

    def __init__(self, decoder: OnnxDecoder, batch: int, capacity: int, encoded: Arrays):
        self.decoder, self.capacity, self.encoded = decoder, capacity, encoded
        self.past = np.zeros(batch, np.int64)
        self.caches: dict[str, np.ndarray] = {}
        for name in decoder.layout.states:
            spec = decoder.specs[name]
            shape = (batch, int(spec.shape[1]), capacity, int(spec.shape[3]))
            self.caches[name] = np.zeros(shape, spec.dtype)
        self.steps: dict[int, _Bound] = {}

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read tokens [B, S], of which lengths [B] are real; the logits [B, V] behind each row's last one.

        Several tokens at once are for empty caches, or for a batch of one row. The rows' pasts are left as they are: `accept`
        moves them on.

        Raises:
            InputError: the caches are full, or onnxruntime cannot run the step.
        """
        check_room(self.past, lengths, self.capacity)
        size = tokens.shape[1]
        if size not in self.steps:
            # A prompt's is needed once.
            self.steps = {size: _Bound(self, size)}
        return self.steps[size].run(tokens, lengths)

    def accept(self, lengths: np.ndarray) -> None:
        """Keep what the last step wrote, so many tokens a row."""
        self.past += lengths


class _Bound:
    """The arrays of steps of one size, bound to onnxruntime."""

    def __init__(self, decoding: Decoding, size: int):
        import onnxruntime as ort

        decoder, layout = decoding.decoder, decoding.decoder.layout
        batch = len(decoding.past)
        self.session = decoder.session
        self.tokens = np.zeros((batch, size), decoder.specs[layout.tokens].dtype)
        self.lengths = np.zeros(batch, np.int64)
        self.logits = np.zeros((batch, 1, decoder.vocabulary), np.float32)
        self.binding = self.session.io_binding()
        inputs = {layout.tokens: self.tokens, PAST_LENGTHS: decoding.past, LENGTHS: self.lengths, **decoding.encoded}
        outputs = {layout.logits: self.logits}
        # On the CPU onnxruntime reads and writes the arrays' own memory.
        for name, array in inputs.items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            self.binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        for past, present in layout.states.items():
            shared = ort.OrtValue.ortvalue_from_numpy(decoding.caches[past])
            self.binding.bind_ortvalue_input(past, shared)
            self.binding.bind_ortvalue_output(present, shared)

    def run(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.tokens[:], self.lengths[:] = tokens, lengths
        try:
            self.session.run_with_iobinding(self.binding)
        # onnxruntime's own exception classes share no public base but Exception.
        except Exception as e:
            raise InputError(
                "Session.generate", f"onnxruntime cannot run the model on these tokens: {first_line(e)}"
            ) from e
        return self.logits[:, 0]
