"""Which sizes the search may choose from: what the target's lattice allows, narrowed by what the caller asks.

Before: groups and a lattice. After: group name -> its legal sizes, ascending. Groups are named by their name, their kind,
or a pattern of either (`*layer.0.*`, `neurons`); a later entry of a mapping overrides an earlier one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tilecut_passes.axes.groups import Group
from tilecut_passes.search import Lattice
from tilecut_runtime.errors import ConfigError


@dataclass(frozen=True)
class Constraints:
    """What the caller asks of the sizes.

    Attributes:
        keep: groups that are not cut.
        fixed: what a group has in the end.
        least, most: the fewest and the most units that a group may have.
        uniform: groups of one kind and dense size have equally many units.
        allows: what else a size must meet, such as the width of a whole head.
    """

    keep: Sequence[str] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    uniform: bool = False
    allows: Callable[[Group, int], bool] = lambda group, size: True


def legal_sizes(groups: Sequence[Group], lattice: Lattice, asked: Constraints) -> dict[str, list[int]]:
    """The legal sizes of every group.

    Raises:
        ConfigError: a name or pattern fits no group, or a group is left without a legal size.
    """
    for option, patterns in (("keep", asked.keep), ("min_units", asked.least), ("max_units", asked.most)):
        for pattern in patterns:
            if not any(fits(group, pattern) for group in groups):
                kinds = ", ".join(dict.fromkeys(g.kind for g in groups))
                raise ConfigError(
                    "PruneConfig",
                    f"{option} names no group that may be cut",
                    got=repr(pattern),
                    wanted=f"a kind ({kinds}), a name such as {groups[0].name}, or a pattern",
                )
    return {group.name: _sizes(group, lattice, asked) for group in groups}


def alike(groups: Sequence[Group], asked: Constraints) -> list[list[str]]:
    """Groups that must have equally many units, by name."""
    if not asked.uniform:
        return []
    classes: dict[tuple[str, int], list[str]] = {}
    for group in groups:
        if group.kind != "layers" and not any(fits(group, pattern) for pattern in asked.keep):
            classes.setdefault((group.kind, group.size), []).append(group.name)
    return [names for names in classes.values() if len(names) > 1]


def fits(group: Group, pattern: str) -> bool:
    """Whether a pattern is the group's kind, its name, or matches its name."""
    return pattern in (group.kind, group.name) or fnmatch.fnmatchcase(group.name, pattern)


def _sizes(group: Group, lattice: Lattice, asked: Constraints) -> list[int]:
    possible = [n for n in lattice.sizes(group.kind, group.size) if n >= group.least]
    all_legal = [n for n in possible if n == group.size or asked.allows(group, n)]
    if any(fits(group, pattern) for pattern in asked.keep):
        return [group.size]
    if group.name in asked.fixed:
        wanted = asked.fixed[group.name]
        if wanted not in all_legal:
            raise ConfigError(
                "PruneConfig",
                f"num_heads_keep does not fit {group.name}",
                got=wanted,
                wanted=f"one of {', '.join(map(str, all_legal))}",
            )
        return [wanted]
    least, most = _asked(group, asked.least, group.least), _asked(group, asked.most, group.size)
    if most < group.least:
        raise ConfigError(
            "PruneConfig",
            f"max_units leaves {group.name} fewer {group.kind} than each position is given",
            got=most,
            wanted=f"at least {group.least}",
        )
    legal = [n for n in all_legal if least <= n <= most]
    if not legal:
        raise ConfigError(
            "PruneConfig",
            f"{group.name} has no legal size from {least} to {most}",
            wanted=f"bounds around one of {', '.join(map(str, all_legal))}",
        )
    return legal


def _asked(group: Group, given: Mapping[str, int], default: int) -> int:
    return next((n for pattern, n in reversed(list(given.items())) if fits(group, pattern)), default)
