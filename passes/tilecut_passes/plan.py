"""PrunePlan: for every group, which units stay. The one thing that search writes and prune and mask read.

The JSON form is for people and for other tools: it names, for each group, the slices of the caller's own `state_dict`
that its units own, so a plan can be read, written by hand, and applied to a freshly captured graph. A plan for
another model is refused with the first mismatch named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tilecut_passes.axes.groups import Frozen, Group, Member
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import PlanError

PLAN_FORMAT = 1


@dataclass(frozen=True)
class GroupPlan:
    """What stays of one group: `kept` units of `size`, then zeros up to `padded_to` (None: no padding)."""

    name: str
    kind: str
    size: int
    kept: tuple[int, ...]
    members: tuple[Member, ...]
    padded_to: int | None = None

    @property
    def count(self) -> int:
        """Units after cutting and padding."""
        return self.padded_to if self.padded_to is not None else len(self.kept)


@dataclass(frozen=True)
class PrunePlan:
    """A plan for one model: `model` is the fingerprint of its tensor names and shapes."""

    model: str
    groups: tuple[GroupPlan, ...]
    target: str = ""
    at: dict[str, int] = field(default_factory=dict)
    frozen: tuple[Frozen, ...] = ()

    @staticmethod
    def keep_all(graph: Graph, groups: Iterable[Group]) -> PrunePlan:
        """The plan that cuts nothing."""
        made = tuple(GroupPlan(g.name, g.kind, g.size, tuple(range(g.size)), g.members) for g in groups)
        return PrunePlan(fingerprint(graph), made)

    def keeping(self, kept: Mapping[str, Sequence[int]]) -> PrunePlan:
        """This plan with the named groups keeping other units.

        Raises:
            PlanError: a name that is no group, or units that are not distinct indices of it.
        """
        known = {g.name for g in self.groups}
        if unknown := [name for name in kept if name not in known]:
            raise PlanError("PrunePlan", "no such group", got=unknown[0], wanted=f"one of {', '.join(sorted(known))}")
        groups = tuple(
            replace(g, kept=tuple(kept[g.name]), padded_to=None) if g.name in kept else g for g in self.groups
        )
        for g in groups:
            _check_units(g)
        return replace(self, groups=groups)

    def matched(self, graph: Graph, groups: Sequence[Group]) -> list[tuple[Group, GroupPlan]]:
        """Each planned group with the graph's group of that name.

        Raises:
            PlanError: the plan is of another model; the first mismatch is named.
        """
        if self.model and (mine := fingerprint(graph)) != self.model:
            # The groups below say what differs; equal groups with another fingerprint differ in a tensor that has none.
            differs = f"model fingerprint {mine[:12]} is not the plan's {self.model[:12]}"
        else:
            differs = ""
        by_name = {g.name: g for g in groups}
        out = []
        for planned in self.groups:
            group = by_name.get(planned.name)
            if group is None:
                raise PlanError(
                    "PrunePlan",
                    f"the model has no group {planned.name}",
                    got=f"groups {', '.join(list(by_name)[:4])}, ..",
                    fix=differs or None,
                )
            if (group.kind, group.size) != (planned.kind, planned.size):
                raise PlanError(
                    "PrunePlan",
                    f"group {planned.name} is another one",
                    got=f"{group.size} {group.kind}",
                    wanted=f"{planned.size} {planned.kind}",
                )
            if set(group.members) != set(planned.members):
                odd = sorted(set(planned.members) ^ set(group.members), key=repr)[0]
                raise PlanError(
                    "PrunePlan",
                    f"group {planned.name} owns other slices; the first is {odd.as_json()}",
                    fix=differs or None,
                )
            _check_units(planned)
            out.append((group, planned))
        if differs:
            raise PlanError("PrunePlan", "the plan was made for another model", got=differs)
        return out

    def as_json(self) -> dict[str, Any]:
        """The plan as plan.json writes it."""
        return {
            "format": PLAN_FORMAT,
            "model": self.model,
            "target": self.target,
            "at": self.at,
            "groups": [
                {
                    "name": g.name,
                    "kind": g.kind,
                    "size": g.size,
                    "kept": list(g.kept),
                    "padded_to": g.padded_to,
                    "members": [m.as_json() for m in g.members],
                }
                for g in self.groups
            ],
            "frozen": [{"name": f.name, "why": f.why} for f in self.frozen],
        }

    def write(self, path: Path) -> None:
        """Write plan.json: one line a group."""
        held = self.as_json()
        groups = ",\n".join("  " + json.dumps(g) for g in held.pop("groups"))
        frozen = ",\n".join("  " + json.dumps(f) for f in held.pop("frozen"))
        head = json.dumps(held)[1:-1]
        path.write_text(f'{{{head},\n "groups": [\n{groups}\n ],\n "frozen": [\n{frozen}\n ]}}\n', encoding="utf-8")

    @staticmethod
    def read(path: Path) -> PrunePlan:
        """Read plan.json.

        Raises:
            PlanError: missing, not JSON, of another format, or malformed.
        """
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise PlanError(str(path), f"cannot be read ({e.strerror})") from e
        except (ValueError, RecursionError) as e:
            raise PlanError(str(path), f"not valid JSON ({e})") from e
        return PrunePlan.from_json(held, str(path))

    @staticmethod
    def from_json(held: Any, where: str = "plan") -> PrunePlan:
        """A plan from what `as_json` returned."""
        if not isinstance(held, dict) or held.get("format") != PLAN_FORMAT:
            raise PlanError(
                where,
                "unknown plan format",
                got=held.get("format") if isinstance(held, dict) else type(held).__name__,
                wanted=PLAN_FORMAT,
            )
        try:
            groups = tuple(
                GroupPlan(
                    str(g["name"]),
                    str(g["kind"]),
                    int(g["size"]),
                    tuple(int(u) for u in g["kept"]),
                    tuple(
                        Member(
                            str(m["parameter"]),
                            int(m["dim"]),
                            int(m["start"]),
                            tuple(int(v) for v in m["view"]),
                            int(m["axis"]),
                        )
                        for m in g["members"]
                    ),
                    None if g.get("padded_to") is None else int(g["padded_to"]),
                )
                for g in held["groups"]
            )
            plan = PrunePlan(
                str(held["model"]),
                groups,
                str(held.get("target", "")),
                dict(held.get("at", {})),
                tuple(Frozen(str(f["name"]), str(f["why"])) for f in held.get("frozen", [])),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise PlanError(where, f"malformed plan ({type(e).__name__}: {e})") from e
        for g in plan.groups:
            _check_units(g)
        return plan


def _check_units(g: GroupPlan) -> None:
    if not g.kept:
        raise PlanError("PrunePlan", f"group {g.name} keeps nothing", got=0, wanted="at least 1 unit")
    if len(set(g.kept)) != len(g.kept) or min(g.kept) < 0 or max(g.kept) >= g.size:
        bad = next((u for i, u in enumerate(g.kept) if u in g.kept[:i] or not 0 <= u < g.size), g.kept[0])
        raise PlanError(
            "PrunePlan",
            f"group {g.name} keeps a unit twice or one that is not there",
            got=bad,
            wanted=f"distinct units of 0..{g.size - 1}",
        )
    if g.padded_to is not None and g.padded_to < len(g.kept):
        raise PlanError(
            "PrunePlan",
            f"group {g.name} is padded to less than it keeps",
            got=g.padded_to,
            wanted=f"at least {len(g.kept)}",
        )


def fingerprint(graph: Graph) -> str:
    """sha256 over the names, dtypes and shapes of the tensors that the graph reads."""
    rows = sorted(f"{name} {t.dtype} {list(t.shape)}" for name, t in graph.tensors.items())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
