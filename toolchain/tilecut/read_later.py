"""What `generate` runs as the encoder of a graph that holds encoder and decoder in one: it hands its input on.

transformers runs the encoder once and gives every step its outputs. Here they are the encoder's input itself, under a
class of its own, which `forward` reads in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_outputs import BaseModelOutput


@dataclass
class Unread(BaseModelOutput):
    """An encoder's input in the place of its output; beam search repeats its rows as it would the output's."""


class ReadLater(nn.Module):
    """Takes what an encoder takes, and returns its main input as it is."""

    def __init__(self, main_input: str):
        super().__init__()
        self.main_input = main_input

    def forward(self, **kwargs: Any) -> Unread:
        """The main input, not yet encoded."""
        return Unread(last_hidden_state=kwargs[self.main_input])
