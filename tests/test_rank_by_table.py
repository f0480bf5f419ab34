"""The table on disk: later budgets need no batch, interruptions lose one row, damage is mended and said."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checks import bert_graph, groups_of, mlp_graph, text_batch
from tilecut_passes import rank_by_table as module
from tilecut_passes.calibration import check_batches
from tilecut_passes.rank_by_table import rank_by_table
from tilecut_passes.table_file import TableFile, table_key
from tilecut_runtime.errors import CalibrationError, ConfigError

SILENT = lambda done, of: None


def setting():
    graph = bert_graph()
    groups = groups_of(graph)
    batches = check_batches(graph, [text_batch(3, 9, seed=i) for i in range(4)])
    sizes = {g.name: list(range(1, g.size + 1)) if g.kind == "heads" else [8, 16, 32, g.size] for g in groups}
    return graph, groups, batches, sizes


def ranked(folder, importance="obs", progress=SILENT, sizes=None, seed=0, outputs=("last_hidden_state",)):
    graph, groups, batches, all_sizes = setting()
    return rank_by_table(graph, groups, sizes or all_sizes, batches, importance, outputs, folder, seed, progress)


def lines(folder):
    (path,) = folder.glob("table-*.jsonl")
    return path.read_text().splitlines()


def test_a_second_run_measures_nothing_and_gives_the_same(tmp_path, monkeypatch):
    first = ranked(tmp_path)
    assert (first.measured, first.held) == (12, 0)
    monkeypatch.setattr(module, "collect_statistics", None)
    monkeypatch.setattr(module, "measure_rows", None)
    second = ranked(tmp_path)
    assert (second.measured, second.held) == (0, 12)
    assert second.rankings == first.rankings


def test_another_lattice_adds_rows_to_the_same_table(tmp_path):
    first = ranked(tmp_path)
    _, groups, _, sizes = setting()
    finer = {n: [8, 16, 24, 32, 40, 48] if len(legal) == 4 and legal[-1] == 48 else legal for n, legal in sizes.items()}
    second = ranked(tmp_path, sizes=finer)
    assert second.held == first.measured and second.measured == 2 * sum(g.kind == "neurons" for g in groups)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_no_folder_keeps_nothing():
    assert ranked(None).rankings == ranked(None).rankings


def test_what_rows_depend_on_is_in_the_key():
    graph, _, batches, _ = setting()
    key = lambda **other: table_key(
        **{"graph": graph, "importance": "obs", "batches": batches, "seed": 0, "outputs": ["a"], **other}
    )[0]
    changed = graph.copy()
    name = next(n for n in graph.tensors if n.endswith("output.dense.weight"))
    changed.set_tensor(name, torch.nn.Parameter(graph.tensor(name) + 1e-3))
    others = [
        key(importance="magnitude"), key(seed=1), key(outputs=["b"]), key(batches=batches[:-1]), key(graph=changed)
    ]  # fmt: skip
    assert key() == key()
    assert len({key(), *others}) == 6


def test_every_importance_orders_its_own_table(tmp_path):
    one, other = ranked(tmp_path, "obs"), ranked(tmp_path, "magnitude")
    assert any(one.rankings[n].order != other.rankings[n].order for n in one.rankings)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_progress_covers_the_rows(tmp_path):
    seen = []
    ranked(tmp_path, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (12, 12)


class Stopped(Exception):
    pass


def test_an_interrupted_table_is_resumed_to_the_same_one(tmp_path):
    whole = ranked(tmp_path / "whole")

    def stop(done, of):
        if (done, of) == (5, 12):
            raise Stopped

    with pytest.raises(Stopped):
        ranked(tmp_path / "cut", progress=stop)
    resumed = ranked(tmp_path / "cut")
    assert (resumed.measured, resumed.held) == (7, 5)
    assert resumed.rankings == whole.rankings
    assert lines(tmp_path / "cut")[1:] == lines(tmp_path / "whole")[1:]


KILLED = """
import sys, time
from pathlib import Path
import test_rank_by_table as t
def slowly(done, of):
    print(done, of, flush=True)
    if of == 12 and done >= 4:
        time.sleep(60)
t.ranked(Path(sys.argv[1]), progress=slowly)
"""


def test_a_killed_run_resumes_to_the_same_table(tmp_path):
    """kill -9 in the middle of the table."""
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        for line in run.stdout:
            if line.strip() == "4 12" or time.monotonic() > deadline:
                break
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    finally:
        run.kill()
        run.stdout.close()
    held = len(lines(folder))
    resumed, whole = ranked(folder), ranked(tmp_path / "whole")
    assert 0 < resumed.held < 12 and held < len(lines(folder))
    assert resumed.rankings == whole.rankings
    assert lines(folder)[1:] == lines(tmp_path / "whole")[1:]


def test_a_line_cut_short_is_dropped(tmp_path):
    whole = ranked(tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    again = ranked(tmp_path)
    assert (again.measured, again.held, again.notes) == (1, 11, ())
    assert again.rankings == whole.rankings


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"loss": ', '"loss": x', 1),
        lambda text: text.replace('"key": "', '"key": "0', 1),
        lambda text: text.replace('"order": [', '"order": [7, ', 1),
        lambda text: json.dumps([1]) + "\n" + text,
        lambda text: text + '{"group": "nobody", "size": 3, "loss": NaN}\n',
        lambda text: "\x00" * 40 + "\n",
    ],
)
def test_a_damaged_table_is_set_aside_and_made_anew(tmp_path, damage):
    whole = ranked(tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(damage(path.read_text()))
    again = ranked(tmp_path)
    assert again.measured == 12 and again.rankings == whole.rankings
    assert len(again.notes) == 1 and "was damaged" in again.notes[0] and "measured again" in again.notes[0]
    assert [p.suffix for p in tmp_path.glob("*.damaged")] == [".damaged"]
    assert ranked(tmp_path).held == 12


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the cost table cannot be kept in .*file.*; set PruneConfig\(cache="):
        ranked(tmp_path / "file" / "below")


def test_no_batches_and_outputs_that_are_not_finite_are_errors(tmp_path):
    graph, groups, _, sizes = setting()
    with pytest.raises(CalibrationError, match="needs calibration batches"):
        rank_by_table(graph, groups, sizes, [], "obs", graph.outputs, None, 0, SILENT)
    mlp = mlp_graph()
    (group,) = groups_of(mlp)
    mlp.set_tensor("down.bias", torch.nn.Parameter(torch.full((3,), 3e38)))
    huge = check_batches(mlp, [{"x": torch.full((2, 12), 1e30)}])
    with pytest.raises(CalibrationError, match="not finite"):
        rank_by_table(mlp, [group], {group.name: [4, 20]}, huge, "magnitude", mlp.outputs, None, 0, SILENT)


def test_labels_measure_the_tasks_own_loss(tmp_path):
    graph = mlp_graph()
    (group,) = groups_of(graph)
    x = torch.randn(40, 12)
    labels = graph.run({"x": x})["output"].argmax(-1)
    batches = check_batches(graph, [{"x": x, "labels": labels}])
    found = rank_by_table(graph, [group], {group.name: [4, 20]}, batches, "obs", graph.outputs, tmp_path, 0, SILENT)
    assert found.rankings[group.name].losses[4] > 0
    assert isinstance(TableFile(None, "", {}).rows, dict) and isinstance(found.path, Path)
