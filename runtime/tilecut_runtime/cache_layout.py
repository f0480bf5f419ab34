"""What a model with a key-value cache is called with: the names of its inputs and outputs, and what ends a text.

    tokens [B, S], past_lengths [B], lengths [B], past_key_values.<i>.key|value [B, Hk, capacity, D]
    -> logits [B, 1, V], present.<i>.key|value [B, Hk, capacity, D]
Rows are padded on the right: row b has lengths[b] real tokens behind the past_lengths[b] that its cache holds.
Where the runtime holds the cache (`stateful`):
    tokens [B, S], attention_mask [B, P + S], position_ids [B, S], beam_idx [B] -> logits [B, 1, V] of the last column
with rows padded on the left; the mask says which of the P columns before and the S new ones are a row's own.
The decoder of an encoder-decoder also takes what its encoder gave, cross.*, the same in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tilecut_runtime.errors import InputError

if TYPE_CHECKING:
    import numpy as np

PAST_LENGTHS, LENGTHS = "past_lengths", "lengths"
MASK, POSITIONS, BEAMS = "attention_mask", "position_ids", "beam_idx"
# What the names of tensors that an encoder gives its decoder begin with.
CROSS = "cross."


def past_name(index: int, part: str) -> str:
    """The input that holds attention `index`'s keys ("key") or values ("value")."""
    return f"past_key_values.{index}.{part}"


def present_name(index: int, part: str) -> str:
    """The output that continues `past_name`."""
    return f"present.{index}.{part}"


def check_room(past_lengths: np.ndarray, lengths: np.ndarray, capacity: int) -> None:
    """Refuse more tokens than caches hold: past_lengths [B] are there, and lengths [B] are to come.

    Raises:
        InputError: the caches are full.
    """
    if (most := int((past_lengths + lengths).max())) > capacity:
        raise InputError("Decoding.step", "the cache is full", got=f"{most} tokens", wanted=f"at most {capacity}")


def is_past(name: str) -> bool:
    """Whether an input's name is one of `past_name`."""
    return name.startswith("past_key_values.")


def present_of(past: str) -> str:
    """The output that continues an input of `past_name`."""
    return past.replace("past_key_values.", "present.", 1)


@dataclass(frozen=True)
class CacheLayout:
    """How a session generates with the model.

    Attributes:
        tokens: the input of token ids.
        logits: the output of logits.
        states: input of a cache -> output that continues it.
        max_length: how many tokens a text may have, the prompt's included.
        eos: ids that end a text.
        start: ids that the decoder of an encoder-decoder begins with.
        stateful: the runtime holds the caches, and `states` is empty.
    """

    tokens: str
    logits: str
    states: Mapping[str, str]
    max_length: int
    eos: tuple[int, ...] = field(default=())
    start: tuple[int, ...] = field(default=())
    stateful: bool = False

    @staticmethod
    def parse(held: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> CacheLayout:
        """From a manifest's JSON, which names inputs and outputs of the model.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        made = CacheLayout(
            held["tokens"],
            held["logits"],
            dict(held["states"]),
            held["max_length"],
            tuple(held["eos"]),
            tuple(held.get("start", ())),
            held.get("stateful", False) is True,
        )
        beside = (MASK, POSITIONS, BEAMS) if made.stateful else (PAST_LENGTHS, LENGTHS)
        for names, known in (
            ((made.tokens, *beside, *made.states), inputs),
            ((made.logits, *made.states.values()), outputs),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"generation names {unknown[0]!r}, which the model does not have")
        if made.logits in made.states.values():
            raise ValueError(f"generation takes {made.logits!r} for logits, which continues a cache")
        if not made.stateful and (left := {name for name in inputs if is_past(name)} - set(made.states)):
            raise ValueError(f"generation's states lack {min(left)!r}")
        counts = (made.max_length, *made.eos, *made.start)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in counts) or made.max_length < 1:
            raise ValueError(f"generation has max_length {made.max_length}, eos {made.eos} and start {made.start}")
        return made
