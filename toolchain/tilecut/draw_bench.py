"""The picture of a bench: a panel for every point of the grid, a bar for every contender. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from tilecut.bench_artifacts import grid_points, title_of
from tilecut.draw_front import DPI, KNEE, LINE, REST

# Panels beside each other; inches of a panel's width, of a bar, and of what a panel needs besides.
COLUMNS, WIDTH, BAR, REST_HEIGHT = 3, 4.2, 0.27, 0.9


def draw_bench(r: Mapping[str, Any]) -> bytes:
    """The report of a bench as PNG: times relative to the first contender of each point, shorter is faster."""
    # No pyplot: it keeps figures, and picks a window system.
    from matplotlib.figure import Figure

    points = grid_points(r["timings"])
    names = list(dict.fromkeys(row["contender"] for row in r["timings"]))
    artifacts = {c["name"] for c in r["contenders"] if c["kind"] == "artifact"}
    columns = min(COLUMNS, len(points))
    rows = -(-len(points) // columns)
    labels = 0.075 * max(map(len, names))
    figure = Figure(
        figsize=(labels + WIDTH * columns, 0.5 + rows * (REST_HEIGHT + BAR * len(names))), dpi=DPI, layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, (point, held) in zip(panels, points.items()):
        times = {row["contender"]: row["times_first"] for row in held if row["times_first"] is not None}
        longest = max(times.values(), default=1.0)
        for place, name in enumerate(names):
            if name not in times:
                panel.text(0, place, " not timed", va="center", fontsize=7, color=KNEE)
                continue
            panel.barh(place, times[name], color=LINE if name in artifacts else REST, height=0.7)
            panel.text(times[name], place, f" {times[name]:.2f}", va="center", fontsize=7)
        panel.axvline(1.0, color="black", linewidth=0.6)
        panel.set_xlim(0, 1.18 * longest)
        panel.set_title(title_of(point), fontsize=9)
        panel.set_yticks(range(len(names)), names, fontsize=7)
        panel.tick_params(axis="x", labelsize=7)
        panel.grid(axis="x", color="#d9dde3", linewidth=0.6)
        panel.set_axisbelow(True)
    # The first contender on top; panels share the axis.
    panels[0].invert_yaxis()
    for panel in panels[len(points) :]:
        panel.set_visible(False)
    bases = {row["base"] for row in r["timings"]}
    to = bases.pop() if len(bases) == 1 else "the first that was timed"
    figure.suptitle(f"time relative to {to}; shorter is faster", fontsize=10)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()
