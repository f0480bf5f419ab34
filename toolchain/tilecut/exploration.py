"""`Exploration`: a folder that `explore` wrote, as it is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tilecut.artifact import Artifact
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import read_json

FRONT, PICTURE, PAGE = "explore.json", "explore.png", "explore.html"
FORMAT = 1


class Exploration:
    """An exploration on disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        held = read_json(self.path / FRONT)
        if not isinstance(held, dict) or held.get("format") != FORMAT or not isinstance(held.get("points"), list):
            raise ArtifactError(str(self.path / FRONT), f"not an exploration of format {FORMAT}", fix="explore again")
        self.report: dict[str, Any] = held

    def __repr__(self) -> str:
        return f"Exploration({str(self.path)!r}, knee={self.knee!r})"

    @property
    def points(self) -> dict[str, dict[str, Any]]:
        """Every budget by its name, and "dense"; `why` is set on those that cannot be met."""
        return {point["name"]: point for point in self.report["points"]}

    @property
    def front(self) -> list[str]:
        """Names of the points that no other one beats, cheapest first."""
        return self.report["front"]

    @property
    def knee(self) -> str | None:
        """The name of the point from which more speed begins to cost more; None where the front does not bend."""
        return self.report["knee"]

    def artifact(self, name: str) -> Artifact:
        """The artifact of a point.

        Raises:
            ArtifactError: no such point, or it was not emitted.
        """
        point = self.points.get(name)
        if point is None or point["artifact"] is None:
            held = [p["name"] for p in self.report["points"] if p["artifact"] is not None]
            raise ArtifactError(
                str(self.path),
                f"it holds no artifact of {name!r}",
                wanted=" or ".join(held) or None,
                fix=None if held else "explore with emit=True",
            )
        return Artifact(self.path / point["artifact"])


def check_exploration(path: Path) -> None:
    """Refuse a folder that holds anything but an exploration.

    Raises:
        ArtifactError: no exploration, or something beside it.
    """
    if not (path / FRONT).is_file():
        raise ArtifactError(
            str(path), "the output folder exists and is no exploration", fix="name another folder, or remove it yourself"
        )
    ours = {FRONT, PICTURE, PAGE, *(point["artifact"] for point in Exploration(path).report["points"])}
    if other := sorted(p.name for p in path.iterdir() if p.name not in ours):
        raise ArtifactError(
            str(path), f"the output folder holds {other[0]}, which explore did not write", fix="name another folder"
        )
