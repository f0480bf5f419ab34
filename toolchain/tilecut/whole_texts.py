"""A session with a key-value cache as a model of whole texts: its logits at every position, token by token.

What decoding costs in accuracy is then measured as any other model is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tilecut_runtime.session import Session


class WholeTexts:
    """Tokens [B, S], and a mask where the model had one -> logits [B, S, V]; every token but the first is a step of decoding.

    An encoder reads its inputs once.
    """

    def __init__(self, session: Session):
        self.session, self.decoder = session, session.decoder

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits, zeros where padding stands on the left of a text."""
        layout = self.decoder.layout
        ids = inputs[layout.tokens].numpy()
        encoded = None
        apart: set[str] = set()
        if self.session.manifest.encoder is not None:
            apart = {spec.name for spec in self.session.encoder.inputs}
            encoded = self.session.encoder.run({name: inputs[name].numpy() for name in apart})
        mask = next((v.numpy() != 0 for name, v in inputs.items() if name != layout.tokens and name not in apart), None)
        first = np.zeros(len(ids), np.int64) if mask is None else mask.argmax(1)
        batch, length = ids.shape
        logits = np.zeros((batch, length, self.decoder.vocabulary), np.float32)
        decoding, one = self.decoder.start(batch, length, encoded), np.ones(batch, np.int64)
        for step in range(length - int(first.min())):
            rows = np.flatnonzero(first + step < length)
            # Rows that are through stay at their last token.
            places = np.minimum(first + step, length - 1)
            found = decoding.step(ids[np.arange(batch), places][:, None], one)
            logits[rows, places[rows]] = found[rows]
            decoding.accept((first + step + 1 < length).astype(np.int64))
        return {layout.logits: torch.from_numpy(logits)}
