"""Calibration data from whatever the caller has: batches, texts, a file of texts, or nothing.

    iterable of dicts      batches of tensors, used as they are
    iterable of strings    texts, tokenized with the model's tokenizer
    file.txt               a text a line
    file.tsv               a header line; the text is the column `text`, else the last one that is neither `label` nor
                           `split`; a column `label` (integers) gives labels; where a column `split` says train, only
                           those rows are read
    file.jsonl             {"text": .., "label": ..} a line; label is optional
    None                   the general text shipped with tilecut when the model has a tokenizer, else nothing

Texts are sorted by length into batches, so that little is padding.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import CalibrationError

BATCH_SIZE = 64
MAX_TEXTS = 4096
GENERAL_TEXTS = 1024
# Where this many batches are there, the last part is held out to measure fidelity on.
HOLD_OUT_FROM, HELD_OUT = 8, 0.1
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Calibration:
    """Batches to fit with, batches held out, and a line that says what they are."""

    fit: list[Batch]
    held_out: list[Batch]
    source: str

    @property
    def tokens(self) -> int:
        """Real positions (or rows, without a mask) in the batches to fit with."""
        return sum(
            int(b.mask.sum()) if b.mask is not None else next(iter(b.inputs.values())).shape[0] for b in self.fit
        )


def load_calibration(given: Any, graph: Graph, model: nn.Module, sequence: int, seed: int = 0) -> Calibration | None:
    """Calibration that fits the graph's inputs, or None when there is none to be had.

    Args:
        sequence: texts are cut to this many tokens.

    Raises:
        CalibrationError: a file that cannot be read, texts without a tokenizer, or batches that do not fit the model.
    """
    if given is None:
        if not _takes_text(graph) or tokenizer_folder(model) is None:
            return None
        texts = (resources.files("tilecut.data") / "general.txt").read_text(encoding="utf-8").splitlines()
        return _from_texts(
            texts[:GENERAL_TEXTS],
            None,
            graph,
            model,
            sequence,
            seed,
            "general text (WordNet glosses, shipped with tilecut)",
        )
    if isinstance(given, str | Path):
        texts, labels = read_texts(Path(given))
        return _from_texts(texts, labels, graph, model, sequence, seed, f"{Path(given).name}")
    if isinstance(given, Mapping):
        raise CalibrationError("calibration", "a single dict, not an iterable of batches", fix="put it into a list")
    try:
        rows = list(given)
    except TypeError as e:
        raise CalibrationError(
            "calibration",
            "neither batches, texts nor a file",
            got=type(given).__name__,
            wanted="an iterable of dicts or strings, or a path",
        ) from e
    if rows and all(isinstance(row, str) for row in rows):
        return _from_texts(rows, None, graph, model, sequence, seed, f"{len(rows)} texts")
    batches = check_batches(graph, rows)
    # Every tenth batch, so that batches sorted by length are held out evenly.
    return _held_out(batches, f"{len(batches)} batches")


def read_texts(path: Path) -> tuple[list[str], list[int] | None]:
    """Texts and, where every row has one, integer labels.

    Raises:
        CalibrationError: missing, of an unknown kind, malformed, or empty.
    """
    where = str(path)
    if not os.path.isfile(path):
        raise CalibrationError(where, "no such calibration file")
    try:
        # Reading makes every line end with a line feed; `splitlines` would also split at what may stand within a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise CalibrationError(where, f"not UTF-8 text ({e.reason} at byte {e.start})") from e
    except OSError as e:
        raise CalibrationError(where, f"cannot be read ({e.strerror})") from e
    labels: list[int | None] = []
    if path.suffix == ".txt":
        texts = [line.strip() for line in lines]
    elif path.suffix == ".tsv":
        texts, labels = _columns(lines, where)
    elif path.suffix == ".jsonl":
        texts = []
        for i, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["text"]
                if not isinstance(text, str):
                    raise TypeError(f"{text!r} is no text")
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise CalibrationError(f"{where}:{i + 1}", 'not a JSON object with a "text"', got=line[:60]) from e
            texts.append(text.strip())
            labels.append(_integer(row.get("label"), where, i))
    else:
        raise CalibrationError(
            where, "unknown kind of calibration file", got=path.suffix or "no suffix", wanted=".txt, .tsv or .jsonl"
        )
    kept = [i for i, text in enumerate(texts) if text]
    if not kept:
        raise CalibrationError(where, "the file holds no text")
    has_labels = bool(labels) and all(labels[i] is not None for i in kept)
    return [texts[i] for i in kept], [int(labels[i] or 0) for i in kept] if has_labels else None


def _columns(lines: list[str], where: str) -> tuple[list[str], list[int | None]]:
    """Texts and labels of a table with a header line; blank lines are no rows."""
    header = [name.strip() for name in lines[0].split("\t")]
    column = next((n for n in ["text", *reversed(header)] if n in header and n not in ("label", "split")), None)
    if column is None:
        raise CalibrationError(where, "no column holds text", got=", ".join(header), wanted="a column text")
    rows = []
    for i, line in enumerate(lines[1:]):
        fields = line.split("\t")
        if any(fields[len(header) :]):
            raise CalibrationError(
                f"{where}: row {i + 1}", "more fields than the header has", got=len(fields), wanted=len(header)
            )
        if line.strip():
            rows.append((i, dict(zip(header, fields))))
    if any(row.get("split") == "train" for _, row in rows):
        rows = [(i, row) for i, row in rows if row.get("split") == "train"]
    texts = [row.get(column, "").strip() for _, row in rows]
    return texts, [_integer(row.get("label", "").strip(), where, i) for i, row in rows]


def _integer(value: Any, where: str, row: int) -> int | None:
    """A label from a file: None where there is none; 1.0 is an integer, 1.7 is not."""
    if value is None or value == "":
        return None
    try:
        number = int(value)
        if (isinstance(value, float) and number != value) or not -(2**63) <= number < 2**63:
            raise ValueError
    except (TypeError, ValueError, OverflowError) as e:
        raise CalibrationError(f"{where}: row {row + 1}", "a label is no integer", got=repr(value)[:60]) from e
    return number


def tokenizer_folder(model: nn.Module) -> Path | None:
    """The folder that the model came from, when a tokenizer lies in it."""
    config = getattr(model, "config", None)
    name = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not name or not Path(name).is_dir():
        return None
    return Path(name) if any((Path(name) / f).is_file() for f in TOKENIZER_FILES) else None


def _takes_text(graph: Graph) -> bool:
    return "input_ids" in graph.inputs


def _from_texts(
    texts: list[str], labels: list[int] | None, graph: Graph, model: nn.Module, sequence: int, seed: int, source: str
) -> Calibration:
    folder = tokenizer_folder(model)
    if folder is None:
        raise CalibrationError(
            "calibration",
            f"{source}: the model has no tokenizer beside it",
            fix="load the model from a folder with its tokenizer, or pass tokenized batches",
        )
    if not _takes_text(graph):
        raise CalibrationError("calibration", f"{source}: the model takes no input_ids", got=", ".join(graph.inputs))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    sequence = min([sequence, *(r.max for name, r in graph.ranges.items() if name == "sequence" and r.max is not None)])
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    order = order[:MAX_TEXTS]
    encoded = tokenizer([texts[i] for i in order], truncation=True, max_length=sequence)["input_ids"]
    ranked = sorted(range(len(order)), key=lambda i: len(encoded[i]))
    batches = []
    for start in range(0, len(ranked), BATCH_SIZE):
        chosen = [order[i] for i in ranked[start : start + BATCH_SIZE]]
        held: dict[str, Any] = dict(
            tokenizer(
                [texts[i] for i in chosen], truncation=True, max_length=sequence, padding=True, return_tensors="pt"
            )
        )
        for name in graph.inputs:
            if name == "token_type_ids" and name not in held:
                held[name] = torch.zeros_like(held["input_ids"])
        held = {k: v for k, v in held.items() if k in graph.inputs}
        if labels is not None:
            held["labels"] = torch.tensor([labels[i] for i in chosen])
        batches.append(held)
    return _held_out(check_batches(graph, batches), f"{source}, {len(order)} texts")


def _held_out(batches: list[Batch], source: str) -> Calibration:
    if len(batches) < HOLD_OUT_FROM:
        return Calibration(batches, batches, f"{source} (too few to hold any out)")
    every = round(1 / HELD_OUT)
    held = [b for i, b in enumerate(batches) if i % every == every // 2]
    return Calibration([b for i, b in enumerate(batches) if i % every != every // 2], held, source)
