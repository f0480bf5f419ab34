"""Remember what was made of tensors, for as long as they live and nobody writes to them. torch only."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary


class Remembered:
    """A memory; `remembered(tensors, beside, make)` makes a value once."""

    def __init__(self) -> None:
        self._held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, tensors: tuple[Tensor, ...], beside: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave for the same tensors, as they were then, and an equal `beside`."""
        # Inference tensors do not count the writes to them.
        if any(x.is_inference() for x in tensors):
            return make()
        entries = self._held.get(tensors[0])
        if entries is None:
            entries = self._held[tensors[0]] = {}
        key = (*(WeakIdRef(x) for x in tensors[1:]), beside)
        versions = [x._version for x in tensors]
        held = entries.get(key)
        if held is None or held[0] != versions:
            for dead in [one for one in entries if any(x() is None for x in one[:-1])]:
                del entries[dead]
            held = entries[key] = (versions, make())
        return held[1]
