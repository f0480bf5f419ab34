"""`method="table"`: removal orders by an importance, losses measured end to end, both kept on disk (`table_file.py`).

What the file holds already is not computed again; where it holds everything, no batch is run at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilecut_passes.axes.groups import Group
from tilecut_passes.calibration import Batch
from tilecut_passes.cost_table import curves, grid, measure_rows, table_batches
from tilecut_passes.dense_layer import dense_layer
from tilecut_passes.graph import Graph
from tilecut_passes.layer_statistics import LayerStatistics, collect_statistics
from tilecut_passes.score import Progress, Ranking, check_rankings, score
from tilecut_passes.score_surgeon import order_units, surgical_groups
from tilecut_passes.share_batches import agreed, process
from tilecut_passes.table_file import TableFile, table_key
from tilecut_runtime.errors import CalibrationError


@dataclass(frozen=True)
class TableRanking:
    """Rankings with measured losses, how many rows were measured and how many the file held, and what was mended."""

    rankings: dict[str, Ranking]
    measured: int
    held: int
    notes: tuple[str, ...]
    path: Path | None


def rank_by_table(
    graph: Graph,
    groups: Sequence[Group],
    sizes: Mapping[str, Sequence[int]],
    batches: Sequence[Batch],
    importance: str,
    outputs: Sequence[str],
    folder: Path | None,
    seed: int,
    progress: Progress,
) -> TableRanking:
    """Measure what is missing of the table and return every group's ranking.

    Args:
        sizes: group name -> its legal sizes, the dense one included.
        importance: orders the units (see `score.IMPORTANCES`).
        outputs: names of the outputs that count.
        folder: where tables are kept; None keeps none.

    Raises:
        CalibrationError: no batches, or a loss that is not finite.
        ConfigError: the folder cannot be written.
    """
    if not batches:
        raise CalibrationError("score", "a cost table needs calibration batches", fix="pass calibration=")
    key, what = table_key(graph, importance, batches, seed, outputs)
    # One process of several reads and writes; all go by what it read.
    first = process()[0] == 0
    table = TableFile(folder / f"table-{key}.jsonl" if folder is not None and first else None, key, what)
    table.rows, table.rankings = agreed((table.rows, table.rankings))
    wanted = [(g.name, n) for g in groups for n in grid(sizes[g.name])]
    missing = [row for row in wanted if row not in table.rows]
    unranked = [g for g in groups if g.name not in table.rankings]
    if missing or unranked:
        statistics = _rank(graph, groups, table, batches, importance, seed, progress)
        done = 0

        def found(name: str, size: int, loss: float) -> None:
            nonlocal done
            if not abs(loss) < float("inf"):
                raise CalibrationError(
                    "score",
                    f"the outputs are not finite when {name} keeps {size}",
                    fix="look for NaN or infinity in the model's weights or the calibration data",
                )
            table.add_row(name, size, loss)
            done += 1
            progress(done, len(missing))

        measured = table_batches(graph, batches, outputs)
        measure_rows(graph, groups, table.rankings, missing, statistics, measured, outputs, found)
    rows = {row: table.rows[row] for row in wanted}
    return TableRanking(
        curves(groups, table.rankings, rows), len(missing), len(wanted) - len(missing), tuple(table.notes), table.path
    )


def _rank(
    graph: Graph,
    groups: Sequence[Group],
    table: TableFile,
    batches: Sequence[Batch],
    importance: str,
    seed: int,
    progress: Progress,
) -> dict[str, LayerStatistics]:
    """Fill in missing rankings; returns the statistics with which rows are refitted."""
    nodes = [s.node.name for g in groups for s in g.gates if dense_layer(s.node) is not None]
    unranked = any(g.name not in table.rankings for g in groups)
    surgeon = importance == "obs" and bool(surgical_groups(groups))
    scored = [b for b in batches if b.labels is not None] or list(batches)
    statistics = collect_statistics(graph, nodes, scored, seed, surgeon and unranked, progress)
    if unranked:
        if surgeon:
            rankings = order_units(graph, groups, statistics, scored, seed, progress)
            check_rankings(rankings)
        else:
            rankings = score(importance, graph, groups, scored, seed, progress)
        for name, ranking in rankings.items():
            table.add_ranking(name, ranking)
    return statistics
