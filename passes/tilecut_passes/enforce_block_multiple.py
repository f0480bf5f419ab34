"""Bring widths to a multiple of the target's block.

Before: neurons in any number, e.g. 1500. After: 1536 (padded) or 1472 (cut) for blocks of 64. Left alone: widths that
are multiples already, and every other kind of group.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.legalize_groups import LegalizeGroups, round_to
from tilecut_runtime.errors import ConfigError


@dataclass(frozen=True)
class EnforceBlockMultiple(LegalizeGroups):
    """Widths of the given kinds become multiples of `block`."""

    block: int = 16
    of: tuple[str, ...] = ("neurons",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ConfigError("EnforceBlockMultiple", "the block must be positive", got=self.block)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The widths that are looked at."""
        return self.of

    def wanted_size(self, axes: Axes, group: Group, count: int) -> int:
        """The next multiple up (pad) or down (cut)."""
        return round_to(count, self.block, self.how)
