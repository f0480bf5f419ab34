"""What a model with a key-value cache is called with: the names of its inputs and outputs, and what ends a text.

    tokens [B, S], past_lengths [B], lengths [B], past_key_values.<i>.key|value [B, Hk, capacity, D]
    -> logits [B, 1, V], present.<i>.key|value [B, Hk, capacity, D]
Rows are padded on the right: row b has lengths[b] real tokens behind the past_lengths[b] that its cache holds.
"""

from __future__ import annotations

PAST_LENGTHS, LENGTHS = "past_lengths", "lengths"


def past_name(index: int, part: str) -> str:
    """The input that holds attention `index`'s keys ("key") or values ("value")."""
    return f"past_key_values.{index}.{part}"


def present_name(index: int, part: str) -> str:
    """The output that continues `past_name`."""
    return f"present.{index}.{part}"
