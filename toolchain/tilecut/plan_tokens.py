"""From what a config wishes of tokens to the entries of a plan: one for every layer behind which tokens go."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.count_token_macs import TokenMacCounter
from tilecut_passes.find_token_sites import TokenStream, find_token_sites
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import run_passes
from tilecut_passes.token_plan import MEAN, TokenPlan, check_schedule
from tilecut_runtime.errors import ConfigError


@dataclass(frozen=True)
class TokenSchedule:
    """A plan's entries, and the stream that they are for."""

    stream: TokenStream
    entries: tuple[TokenPlan, ...]

    def counter(self, axes: Axes, groups: list[Group], at: Mapping[str, int]) -> TokenMacCounter:
        """What counts the MACs of the graph that `axes` types with these tokens gone."""
        return TokenMacCounter(axes, groups, at, self.stream, self.entries)


def fused_stream(dense: Graph) -> tuple[Graph, TokenStream]:
    """A copy of a captured graph with its attentions fused, and its stream.

    Raises:
        ConfigError: no token can be removed from the model.
    """
    fused = dense.copy()
    run_passes(fused, [FuseAttention()])
    stream = find_token_sites(fused)
    if isinstance(stream, str):
        raise ConfigError("tokens", "no token can be removed from this model", got=stream, fix="leave tokens out")
    return fused, stream


def plan_tokens(
    stream: TokenStream, wishes: Mapping[int | str, float], restored: str = MEAN
) -> tuple[TokenPlan, ...]:
    """The entries for `wishes`: layers by number, by name or by a pattern that names any number of them.

    Raises:
        ConfigError: no such layer, or one that two wishes name.
        PlanError: a layer that is to keep more than the one before.
    """
    names = [site.name for site in stream.sites]
    kept: dict[str, float] = {}
    for wish, fraction in wishes.items():
        met = _named(wish, names)
        if not met:
            raise ConfigError(
                "tokens",
                "no such layer has others behind it",
                got=repr(wish),
                wanted=f"0 to {len(names) - 1}, or a pattern for {', '.join(names)}",
            )
        if twice := [name for name in met if name in kept]:
            raise ConfigError("tokens", f"two wishes are for {twice[0]}", got=repr(wish), fix="leave one out")
        kept |= dict.fromkeys(met, fraction)
    made = tuple(TokenPlan(name, kept[name], restored=restored) for name in names if name in kept)
    check_schedule(made)
    return made


def _named(wish: int | str, names: Sequence[str]) -> list[str]:
    if isinstance(wish, int) or wish.strip().isdecimal():
        return list(names[int(wish) : int(wish) + 1]) if int(wish) >= 0 else []
    return [name for name in names if name == wish or fnmatch.fnmatchcase(name, wish)]
