"""Texts and labels from a file, in the columns that data sets commonly use.

    file.txt      a text a line
    file.tsv      a header line, then a text a row; where a column `split` says train, only those rows are read
    file.jsonl    an object a line

A text is one column, or two that belong together (`PAIRS`) and are tokenized as a pair. It is the first of `COLUMNS` that
is there; a TSV without any of them takes its last column that is neither label nor split. `label` (integers) is optional:
labels count where every row has one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tilecut_runtime.errors import CalibrationError

# A text, or two that are read together.
Text = str | tuple[str, str]

COLUMNS = ("text", "sentence", "content", "document", "article", "passage")
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "context"),
    ("question", "sentence"),
    ("query", "passage"),
)
NO_TEXT = ("label", "labels", "split", "idx", "id")


def text_columns(names: Collection[str]) -> tuple[str, ...]:
    """The column of texts among `names`, or the two of pairs; none where no name is known."""
    known = [PAIRS[0], COLUMNS[:1], *PAIRS[1:], *((name,) for name in COLUMNS[1:])]
    return next((columns for columns in known if all(name in names for name in columns)), ())


def read_texts(path: Path) -> tuple[list[Text], list[int] | None]:
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
    texts: list[Text]
    if path.suffix == ".txt":
        texts = [line.strip() for line in lines]
    elif path.suffix == ".tsv":
        texts, labels = _table(lines, where)
    elif path.suffix == ".jsonl":
        texts, labels = _objects(lines, where)
    else:
        raise CalibrationError(
            where, "unknown kind of calibration file", got=path.suffix or "no suffix", wanted=".txt, .tsv or .jsonl"
        )
    kept = [i for i, text in enumerate(texts) if (text if isinstance(text, str) else all(text))]
    if not kept:
        raise CalibrationError(where, "the file holds no text")
    has_labels = bool(labels) and all(labels[i] is not None for i in kept)
    return [texts[i] for i in kept], [int(labels[i] or 0) for i in kept] if has_labels else None


def _objects(lines: list[str], where: str) -> tuple[list[Text], list[int | None]]:
    """Texts and labels of JSON lines; blank lines are no rows."""
    texts: list[Text] = []
    labels: list[int | None] = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            columns = text_columns(row if isinstance(row, dict) else ())
            if not columns:
                raise KeyError("text")
            found = [row[column] for column in columns]
            if odd := [value for value in found if not isinstance(value, str)]:
                raise TypeError(f"{odd[0]!r} is no text")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise CalibrationError(f"{where}:{i + 1}", 'not a JSON object with a "text"', got=line[:60]) from e
        texts.append(_text(found))
        labels.append(_integer(row.get("label"), where, i))
    return texts, labels


def _table(lines: list[str], where: str) -> tuple[list[Text], list[int | None]]:
    """Texts and labels of a table with a header line; blank lines are no rows."""
    header = [name.strip() for name in lines[0].split("\t")]
    columns = text_columns(header) or tuple([name for name in header if name not in NO_TEXT][-1:])
    if not columns:
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
    texts = [_text([row.get(column, "") for column in columns]) for _, row in rows]
    return texts, [_integer(row.get("label", "").strip(), where, i) for i, row in rows]


def _text(parts: list[str]) -> Text:
    return parts[0].strip() if len(parts) == 1 else (parts[0].strip(), parts[1].strip())


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
