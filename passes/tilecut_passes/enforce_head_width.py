"""Bring head widths to a multiple that the target's attention kernel takes.

Before: heads of any width, e.g. 20. After: 32 (padded, multiple 16) or 16 (cut). The softmax scale stays the dense
one, which the graph names. Left alone: widths that are multiples already; widths that a norm or a table fixes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.legalize_groups import LegalizeGroups, round_to
from tilecut_runtime.errors import ConfigError


@dataclass(frozen=True)
class EnforceHeadWidth(LegalizeGroups):
    """Query-key and value widths of every head become multiples of `multiple`."""

    multiple: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple < 1:
            raise ConfigError("EnforceHeadWidth", "the multiple must be positive", got=self.multiple)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Both widths of a head."""
        return ("qk_width", "vo_width")

    def wanted_size(self, axes: Axes, group: Group, count: int) -> int:
        """Units so that the whole head is a multiple; a rotary half occurs twice in its head and counts twice."""
        if "norm" in group.axis.roles:
            return count
        sink = group.gates[0]
        head = next((a for a in axes.of[sink.source] if group.axis in a.leaves), group.axis)
        inner = [f for f in head.factors if group.axis in f.leaves]
        times = sum(f.leaves.count(group.axis) for f in inner)
        width = sum(int(f.size) for f in inner) + (count - group.size) * times
        step = round_to(width, self.multiple, self.how) - width
        return count + step // times if step % times == 0 else count
