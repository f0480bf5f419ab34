"""The picture of an exploration: every budget as a point, the front as a line, the knee marked. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from tilecut_runtime.errors import ConfigError

# The colours of report.html.
LINE, REST, KNEE = "#2f6fb2", "#9aa3af", "#b3261e"
SIZE, DPI = (8.0, 5.0), 150


def check_matplotlib(where: str) -> None:
    """Say what is missing before the long work; `where` names the command.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as e:
        raise ConfigError(where, "matplotlib is not installed", fix="pip install 'tilecut[explore]'") from e


def draw_front(r: Mapping[str, Any]) -> bytes:
    """The report of an exploration as PNG."""
    # No pyplot: it keeps figures, and picks a window system.
    from matplotlib.figure import Figure

    cost, quality = r["cost"], r["quality"]
    found = {p["name"]: p for p in r["points"] if p["why"] is None}
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    front = [found[name] for name in r["front"]]
    axes.plot(
        [p["cost"] for p in front],
        [p["quality"] for p in front],
        color=LINE,
        marker="o",
        label="Pareto front",
    )
    if beaten := [p for p in found.values() if p["name"] not in r["front"]]:
        axes.plot(
            [p["cost"] for p in beaten],
            [p["quality"] for p in beaten],
            color=REST,
            marker="o",
            markerfacecolor="none",
            linestyle="none",
            label="beaten by another point",
        )
    if r["knee"] is not None:
        knee = found[r["knee"]]
        axes.plot(
            knee["cost"], knee["quality"], color=KNEE, marker="*", markersize=16, linestyle="none", label="knee"
        )
    for p in found.values():
        axes.annotate(p["name"], (p["cost"], p["quality"]), (5, -11), textcoords="offset points", fontsize=8)
    if quality["better"] == "lower":
        axes.invert_yaxis()
    axes.set_xlabel(cost["label"])
    axes.set_ylabel(f"{quality['label']} ({quality['better']} is better)")
    axes.set_title(r["title"], fontsize=11)
    axes.margins(0.12)
    axes.grid(color="#d9dde3", linewidth=0.6)
    axes.legend(loc="best", frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()
