"""What a model with a key-value cache is called with: the names of its inputs and outputs, and what ends a text.

    tokens [B, S], past_lengths [B], lengths [B], past_key_values.<i>.key|value [B, Hk, capacity, D]
    -> logits [B, 1, V], present.<i>.key|value [B, Hk, capacity, D]
Rows are padded on the right: row b has lengths[b] real tokens behind the past_lengths[b] that its cache holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PAST_LENGTHS, LENGTHS = "past_lengths", "lengths"


def past_name(index: int, part: str) -> str:
    """The input that holds attention `index`'s keys ("key") or values ("value")."""
    return f"past_key_values.{index}.{part}"


def present_name(index: int, part: str) -> str:
    """The output that continues `past_name`."""
    return f"present.{index}.{part}"


@dataclass(frozen=True)
class CacheLayout:
    """How a session generates with the model.

    Attributes:
        tokens: the input of token ids.
        logits: the output of logits.
        states: input of a cache -> output that continues it.
        max_length: how many tokens a text may have, the prompt's included.
        eos: ids that end a text.
    """

    tokens: str
    logits: str
    states: Mapping[str, str]
    max_length: int
    eos: tuple[int, ...] = field(default=())

    @staticmethod
    def parse(held: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> CacheLayout:
        """From a manifest's JSON, which names inputs and outputs of the model.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        made = CacheLayout(held["tokens"], held["logits"], dict(held["states"]), held["max_length"], tuple(held["eos"]))
        for names, known in (
            ((made.tokens, PAST_LENGTHS, LENGTHS, *made.states), inputs),
            ((made.logits, *made.states.values()), outputs),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"generation names {unknown[0]!r}, which the model does not have")
        counts = (made.max_length, *made.eos)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in counts) or made.max_length < 1:
            raise ValueError(f"generation has max_length {made.max_length} and eos {made.eos}")
        return made
