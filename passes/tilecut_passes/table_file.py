"""The cost table on disk: one line a row, appended as it is measured, so that an interruption loses one row at most.

    {"format": 1, "key": .., "what": {..}}                   the first line: what the rows hold for
    {"group": "encoder.layer.0:neurons", "order": [..], "losses": [..]}      a ranking
    {"group": "encoder.layer.0:neurons", "size": 512, "loss": 0.0123}        a row

`key` is the hash of everything that a row depends on: the model's numbers and graph, the importance, the calibration, the
seed and the outputs that count; not of the budget, the lattice or the target. A line that a killed process left unfinished
is dropped. A file that is damaged in any other way is set aside as `<name>.damaged` and made anew, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.score import Ranking
from tilecut_runtime.errors import ConfigError

TABLE_FORMAT = 1


class TableFile:
    """Rows and rankings of one table, in memory and, where there is a path, on disk. `notes` says what was mended."""

    def __init__(self, path: Path | None, key: str, what: Mapping[str, Any]):
        self.path, self.key = path, key
        self.rows: dict[tuple[str, int], float] = {}
        self.rankings: dict[str, Ranking] = {}
        self.notes: list[str] = []
        if path is None:
            return
        head = json.dumps({"format": TABLE_FORMAT, "key": key, "what": dict(what)}) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read(path)
            if not path.exists():
                with path.open("w", encoding="utf-8") as file:
                    file.write(head)
        except OSError as e:
            raise ConfigError(
                "cache", f"the cost table cannot be kept in {path.parent} ({e.strerror})", fix="set PruneConfig(cache=...)"
            ) from e

    def add_ranking(self, group: str, ranking: Ranking) -> None:
        """Keep a ranking."""
        self.rankings[group] = ranking
        self._append({"group": group, "order": ranking.order, "losses": ranking.losses})

    def add_row(self, group: str, size: int, loss: float) -> None:
        """Keep a row."""
        self.rows[group, size] = loss
        self._append({"group": group, "size": size, "loss": loss})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is not None:
            # One write of one line: what other processes append stands before or after it.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _read(self, path: Path) -> None:
        raw = path.read_bytes()
        whole, _, rest = raw.rpartition(b"\n")
        try:
            self._parse([json.loads(line) for line in whole.decode("utf-8").split("\n")] if whole else [{}])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as e:
            self.rows, self.rankings = {}, {}
            aside = path.with_name(path.name + ".damaged")
            os.replace(path, aside)
            self.notes.append(
                f"cost table {path.name} was damaged ({type(e).__name__}: {e}) and is measured again; it lies in {aside}"
            )
            return
        if rest:
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1)

    def _parse(self, lines: Sequence[Any]) -> None:
        if lines[0].get("format") != TABLE_FORMAT or lines[0].get("key") != self.key:
            raise ValueError("its first line is not that of this table")
        for line in lines[1:]:
            name = line["group"]
            if "size" in line:
                loss = line["loss"]
                if not isinstance(loss, float) or not math.isfinite(loss):
                    raise ValueError(f"a loss of {name} is {loss!r}")
                self.rows[name, int(line["size"])] = loss
                continue
            order, losses = [int(u) for u in line["order"]], [float(x) for x in line["losses"]]
            if sorted(order) != list(range(len(order))) or len(losses) != len(order) + 1:
                raise ValueError(f"the order of {name} is no order of its units")
            if not all(map(math.isfinite, losses)):
                raise ValueError(f"the losses of {name} are not finite")
            self.rankings[name] = Ranking(tuple(order), tuple(losses))


def table_key(
    graph: Graph, importance: str, batches: Sequence[Batch], seed: int, outputs: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """The hash of all that rows depend on, and its parts for people to read."""
    calls = "\n".join(f"{n.name} {n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes)
    what = {
        "model": hash_tensors(dict(sorted(graph.tensors.items()))),
        "graph": hashlib.sha256(calls.encode()).hexdigest()[:32],
        "importance": importance,
        "calibration": hash_tensors(
            {
                f"{i} {name}": tensor
                for i, b in enumerate(batches)
                for name, tensor in {**b.inputs, **({"labels": b.labels} if b.labels is not None else {})}.items()
            }
        ),
        "seed": seed,
        "outputs": sorted(outputs),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps([TABLE_FORMAT, what]).encode()).hexdigest()[:32], what


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, shapes, types and every number."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        total.update(f"{name} {held.dtype} {list(held.shape)}\n".encode())
        total.update(held.reshape(-1).view(torch.uint8).numpy().data if held.numel() else b"")
    return total.hexdigest()
