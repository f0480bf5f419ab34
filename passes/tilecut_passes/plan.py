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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tilecut_passes.axes.groups import Frozen, Group, Member, fewest
from tilecut_passes.graph import Graph
from tilecut_passes.token_plan import TokenPlan, check_schedule
from tilecut_runtime.errors import PlanError

PLAN_FORMAT = 1
ROTATIONS = "rotations.safetensors"


@dataclass(frozen=True)
class GroupPlan:
    """What stays of one group: `kept` units of `size`, then zeros up to `padded_to` (None: no padding).

    `unknown` is the kept word of a vocabulary that is read instead of one that went; None: the first that is kept.
    """

    name: str
    kind: str
    size: int
    kept: tuple[int, ...]
    members: tuple[Member, ...]
    padded_to: int | None = None
    unknown: int | None = None

    @property
    def count(self) -> int:
        """Units after cutting and padding."""
        return self.padded_to if self.padded_to is not None else len(self.kept)


@dataclass(frozen=True)
class PrunePlan:
    """A plan for one model: `model` is the fingerprint of its `tensors` (name -> dtype and shape).

    `aliases` maps names of tied tensors to the name that the members use. `tokens` says how many tokens stay behind which
    layers, in the layers' order. `rotations` are the bases that the units of `hidden` groups are channels of: name of a
    group -> Q [H, H] (`rotate_hidden.py`); plan.json has their hashes, the numbers are in a file beside it.
    """

    model: str
    groups: tuple[GroupPlan, ...]
    target: str = ""
    at: dict[str, int] = field(default_factory=dict)
    frozen: tuple[Frozen, ...] = ()
    tensors: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    tokens: tuple[TokenPlan, ...] = ()
    rotations: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @staticmethod
    def keep_all(graph: Graph, groups: Iterable[Group]) -> PrunePlan:
        """The plan that cuts nothing."""
        made = tuple(GroupPlan(g.name, g.kind, g.size, tuple(range(g.size)), g.members) for g in groups)
        return PrunePlan(fingerprint(graph), made, tensors=shapes(graph), aliases=dict(graph.aliases))

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
        differs = self._first_difference(graph)
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
            if len(planned.kept) < group.least:
                raise PlanError(
                    "PrunePlan",
                    f"group {planned.name} keeps fewer {group.kind} than each position is given",
                    got=len(planned.kept),
                    wanted=f"at least {group.least}",
                )
            out.append((group, planned))
        if differs:
            raise PlanError("PrunePlan", "the plan was made for another model", got=differs)
        return out

    def _first_difference(self, graph: Graph) -> str:
        """The first tensor in which a graph is not the model of the plan; "" where there is none."""
        if not self.model or (mine := fingerprint(graph)) == self.model:
            return ""
        theirs = shapes(graph)
        for name in sorted(self.tensors.keys() | theirs.keys()):
            if self.tensors and self.tensors.get(name) != theirs.get(name):
                return (
                    f"tensor {name} is {theirs.get(name, 'missing')}, in the plan {self.tensors.get(name, 'missing')}"
                )
        return f"model fingerprint {mine[:12]} is not the plan's {self.model[:12]}"

    def for_graph(self, graph: Graph, groups: Sequence[Group]) -> PrunePlan:
        """This plan for another graph of the same model, which may read a part of its tensors: one step with a cache.

        Raises:
            PlanError: a tensor differs from the plan's, or a planned group is not one group there.
        """
        theirs = shapes(graph)
        if odd := next((n for n in theirs if n in self.tensors and theirs[n] != self.tensors[n]), None):
            raise PlanError("PrunePlan", f"tensor {odd} is another one", got=theirs[odd], wanted=self.tensors[odd])
        made = []
        for planned in self.groups:
            own = set(planned.members)
            met = [g for g in groups if g.kind == planned.kind and own & set(g.members)]
            if len(met) > 1 or (met and not own >= set(met[0].members)):
                raise PlanError("PrunePlan", f"group {planned.name} is not one group of this graph", got=met[0].name)
            made += [replace(planned, name=g.name, members=g.members) for g in met]
        return replace(self, model=fingerprint(graph), groups=tuple(made), tensors=theirs, aliases=dict(graph.aliases))

    def as_json(self) -> dict[str, Any]:
        """The plan as plan.json writes it."""
        return {
            "format": PLAN_FORMAT,
            "model": self.model,
            "tensors": self.tensors,
            "aliases": self.aliases,
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
                    **({} if g.unknown is None else {"unknown": g.unknown}),
                }
                for g in self.groups
            ],
            "tokens": [one.as_json() for one in self.tokens],
            "frozen": [{"name": f.name, "why": f.why} for f in self.frozen],
            **({"rotations": {name: _digest(basis) for name, basis in self.rotations.items()}} if self.rotations else {}),
        }

    def write(self, path: Path) -> None:
        """Write plan.json: one line a group and a tensor; and the bases of its hidden widths beside it, where it has some."""
        held = self.as_json()
        groups = ",\n".join("  " + json.dumps(g) for g in held.pop("groups"))
        frozen = ",\n".join("  " + json.dumps(f) for f in held.pop("frozen"))
        head = json.dumps(held)[1:-1]
        path.write_text(f'{{{head},\n "groups": [\n{groups}\n ],\n "frozen": [\n{frozen}\n ]}}\n', encoding="utf-8")
        if self.rotations:
            save_file({name: basis.contiguous() for name, basis in self.rotations.items()}, path.with_name(ROTATIONS))

    @staticmethod
    def read(path: Path) -> PrunePlan:
        """Read plan.json.

        Raises:
            PlanError: missing, not JSON, of another format, malformed, or without the bases that it names.
        """
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise PlanError(str(path), f"cannot be read ({e.strerror})") from e
        except (ValueError, RecursionError) as e:
            raise PlanError(str(path), f"not valid JSON ({e})") from e
        return PrunePlan.from_json(held, str(path), _read_rotations(Path(path)))

    @staticmethod
    def from_json(held: Any, where: str = "plan", rotations: Mapping[str, Tensor] | None = None) -> PrunePlan:
        """A plan from what `as_json` returned, and the bases that it names."""
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
                    tuple(_integer(u) for u in g["kept"]),
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
                    None if g.get("unknown") is None else _integer(g["unknown"]),
                )
                for g in held["groups"]
            )
            plan = PrunePlan(
                str(held["model"]),
                groups,
                str(held.get("target", "")),
                dict(held.get("at", {})),
                tuple(Frozen(str(f["name"]), str(f["why"])) for f in held.get("frozen", [])),
                {str(k): str(v) for k, v in held.get("tensors", {}).items()},
                {str(k): str(v) for k, v in held.get("aliases", {}).items()},
                tuple(TokenPlan.from_json(one) for one in held.get("tokens", [])),
                _named_rotations(dict(held.get("rotations", {})), rotations or {}, where),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise PlanError(where, f"malformed plan ({type(e).__name__}: {e})") from e
        if plan.tensors and _hash(plan.tensors) != plan.model:
            raise PlanError(where, "malformed plan: model is not the hash of tensors")
        names = [g.name for g in plan.groups]
        if twice := [n for n in names if names.count(n) > 1]:
            raise PlanError(where, f"malformed plan: group {twice[0]} is there twice")
        for g in plan.groups:
            _check_units(g)
        check_schedule(plan.tokens, f"{where}: tokens")
        return plan


def _read_rotations(path: Path) -> dict[str, Tensor]:
    """The bases beside a plan.json; none where there is no file of them."""
    beside = path.with_name(ROTATIONS)
    if not beside.exists():
        return {}
    try:
        return load_file(beside)
    except (SafetensorError, OSError) as e:
        raise PlanError(str(beside), f"not a safetensors file ({e})", fix="take the file that was written with the plan") from e


def _named_rotations(wanted: Mapping[str, str], given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The bases that a plan names, each with its hash."""
    for name, digest in wanted.items():
        if name not in given or _digest(given[name]) != digest:
            raise PlanError(
                where,
                f"the basis of {name} is {'not the one it was made with' if name in given else 'missing'}",
                fix=f"keep {ROTATIONS} beside plan.json",
            )
    return {name: given[name] for name in wanted}


def _digest(basis: Tensor) -> str:
    return hashlib.sha256(basis.detach().float().contiguous().numpy().tobytes()).hexdigest()


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no unit")
    return value


def _check_units(g: GroupPlan) -> None:
    if len(g.kept) < fewest(g.kind):
        raise PlanError("PrunePlan", f"group {g.name} keeps nothing", got=0, wanted="at least 1 unit")
    if len(set(g.kept)) != len(g.kept) or any(not 0 <= unit < g.size for unit in g.kept):
        bad = next((u for i, u in enumerate(g.kept) if u in g.kept[:i] or not 0 <= u < g.size), g.kept[0])
        raise PlanError(
            "PrunePlan",
            f"group {g.name} keeps a unit twice or one that is not there",
            got=bad,
            wanted=f"distinct units of 0..{g.size - 1}",
        )
    if g.unknown is not None and g.unknown not in g.kept:
        raise PlanError(
            "PrunePlan", f"group {g.name} does not keep the unit that stands for those that go", got=g.unknown
        )
    if g.padded_to is not None and g.padded_to < len(g.kept):
        raise PlanError(
            "PrunePlan",
            f"group {g.name} is padded to less than it keeps",
            got=g.padded_to,
            wanted=f"at least {len(g.kept)}",
        )


def shapes(graph: Graph) -> dict[str, str]:
    """Dtype and shape of every tensor that the graph reads, by name."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in sorted(graph.tensors.items())}


def fingerprint(graph: Graph) -> str:
    """sha256 over the names, dtypes and shapes of the tensors that the graph reads."""
    return _hash(shapes(graph))


def _hash(tensors: Mapping[str, str]) -> str:
    rows = [f"{name} {shape}" for name, shape in sorted(tensors.items())]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
