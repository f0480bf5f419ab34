"""Bring head counts to a power of two.

Before: heads in any number, e.g. 5. After: 8 (padded) or 4 (cut). Left alone: powers of two, and other kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.legalize_groups import LegalizeGroups


@dataclass(frozen=True)
class EnforcePowerOfTwoHeads(LegalizeGroups):
    """Heads become a power of two in number; in grouped-query attention both the KV groups and the queries of each."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Heads of plain attention; groups and their queries of grouped-query attention."""
        return ("heads", "kv_groups", "queries")

    def wanted_size(self, axes: Axes, group: Group, count: int) -> int:
        """The next power of two up (pad) or down (cut)."""
        below = 1 << (count.bit_length() - 1)
        return below if below == count or self.how == "cut" else below * 2
