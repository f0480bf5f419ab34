"""What the caller holds in memory, as texts, as rows to be batched, or as batches.

    a Hugging Face `Dataset`, `IterableDataset`     rows of named columns
    a `DatasetDict`, or a dict of data sets         its `train`, else its only one
    a DataLoader, a list, a generator, ..           of any of the following

    a string; a tuple of one or two strings and perhaps a label; a dict with text columns       a text
    a dict, or tensors in forward's order and perhaps labels, of one rank less than the inputs   a row
    a dict, or tensors in forward's order and perhaps labels                                     a batch
    a dict whose lists differ in length; a list of strings; a dict of lists of strings          a batch, taken apart

The first element says what the others are. Columns of token ids come before columns of text. Text columns are found by
name (`read_texts.text_columns`), else the only one that holds strings. What is longer than `MAX_ROWS` is sampled where
it can be indexed, and cut off where it is a stream, which may have no end; a list or tuple of batches is taken whole.
`datasets` is not imported: its objects are known by what they offer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from tilecut.read_texts import Text, text_columns
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import CalibrationError

MAX_ROWS = 4096
WANTED = "an iterable of dicts, tensors or strings, or a path"
LABELS = ("labels", "label")


@dataclass
class Rows:
    """Texts with a label each or none, or rows, or batches: one of the three is filled. Rows and batches are by name."""

    texts: list[Text] = field(default_factory=list)
    labels: list[int | float] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_rows(given: Any, graph: Graph, seed: int = 0) -> Rows:
    """Read everything that is given, or `MAX_ROWS` rows of it.

    Raises:
        CalibrationError: nothing there, nothing that the model reads, or elements of different kinds.
    """
    given = _unwrap(given)
    out = Rows()
    elements, stream = _elements(given, seed, out.notes)
    ranks = {spec.name: len(spec.shape) for spec in graph.input_specs()}
    columns: tuple[str, ...] | None = None
    labels: list[Any] = []
    taken = 0
    for i, element in enumerate(elements):
        columns = _columns(element, graph, f"calibration row {i}") if columns is None else columns
        if columns:
            found = list(_texts(element, columns, f"calibration row {i}"))
            out.texts += [text for text, _ in found]
            labels += [label for _, label in found]
            taken += len(found)
        else:
            named = _named(element, graph, f"calibration batch {i}")
            if _is_row(named, ranks):
                out.rows.append(named)
                taken += 1
            else:
                out.batches.append(named)
                taken += _length(named, ranks)
        if stream and taken >= MAX_ROWS:
            out.notes.append(f"the first {taken} rows of a stream were taken")
            break
    if columns:
        _keep_texts(out, labels)
    elif not out.rows and not out.batches:
        raise CalibrationError("calibration", "no batches", got=0, wanted="at least 1")
    elif out.rows or any(_is_ragged(named, graph) for named in out.batches):
        for i, named in enumerate(out.batches):
            out.rows += _apart(named, ranks, f"calibration batch {i}")
        out.batches = []
    return out


def _unwrap(given: Any) -> Any:
    """The data set inside a dict of splits; records of a data frame."""
    if isinstance(given, Mapping):
        splits = {str(k): v for k, v in given.items()}
        if not splits or not all(hasattr(v, "column_names") for v in splits.values()):
            raise CalibrationError("calibration", "a single dict, not an iterable of batches", fix="put it into a list")
        if "train" not in splits and len(splits) > 1:
            raise CalibrationError(
                "calibration", "several splits, and none is train", got=", ".join(splits), fix="pass one of them"
            )
        return splits.get("train", next(iter(splits.values())))
    # Iterating over a data frame gives the names of its columns.
    return given.to_dict("records") if hasattr(given, "iterrows") else given


def _elements(given: Any, seed: int, notes: list[str]) -> tuple[Iterable[Any], bool]:
    """What to go through, and whether it is a stream to be cut off."""
    if isinstance(given, list | tuple):
        return given, False
    indexed = all(hasattr(given, name) for name in ("__len__", "__getitem__"))
    if indexed and len(given) > MAX_ROWS:
        notes.append(f"{MAX_ROWS} of {len(given)} rows were drawn at random")
        chosen = sorted(random.Random(seed).sample(range(len(given)), MAX_ROWS))
        return (given[i] for i in chosen), False
    if indexed and not hasattr(given, "__iter__"):
        # A torch Dataset: Python's own protocol would wait for an IndexError.
        return (given[i] for i in range(len(given))), False
    try:
        return iter(given), not indexed
    except TypeError as e:
        raise CalibrationError(
            "calibration", "neither batches, texts nor a file", got=type(given).__name__, wanted=WANTED
        ) from e


def _columns(element: Any, graph: Graph, where: str) -> tuple[str, ...]:
    """The columns of text, by which the first element says that all are texts; none for tensors."""
    if isinstance(element, str) or _is_text_tuple(element) or _all_strings(element):
        return ("text",)
    if not isinstance(element, Mapping) or any(name in graph.inputs for name in element):
        return ()
    named = text_columns(tuple(map(str, element)))
    if named:
        return named
    strings = [str(k) for k, v in element.items() if k not in LABELS and (isinstance(v, str) or _all_strings(v))]
    if len(strings) > 1:
        raise CalibrationError(
            where, "several columns hold text", got=", ".join(strings), fix="rename the one to use to text"
        )
    return tuple(strings)


def _is_text_tuple(element: Any) -> bool:
    return isinstance(element, tuple) and 0 < len(element) <= 3 and isinstance(element[0], str)


def _all_strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(v, str) for v in value)


def _texts(element: Any, columns: tuple[str, ...], where: str) -> Iterator[tuple[Text, Any]]:
    """The texts of an element, each with its label or None; rows without text (None, empty) are left out."""
    if isinstance(element, Mapping):
        label = next((element[name] for name in LABELS if name in element), None)
        parts = [element.get(column) for column in columns]
        if all(isinstance(part, list | tuple) for part in parts):
            labels = [None] * len(parts[0] or ()) if label is None else list(label)
            if len({len(part or ()) for part in parts} | {len(labels)}) > 1:
                raise CalibrationError(where, "columns of different lengths", got=", ".join(map(str, element)))
            yield from _text_rows(zip(*parts), labels, where)
        else:
            yield from _text_rows([parts], [label], where)
    elif isinstance(element, list):
        yield from _text_rows([[text] for text in element], [None] * len(element), where)
    elif isinstance(element, tuple):
        strings = [part for part in element if isinstance(part, str)]
        rest = [part for part in element if not isinstance(part, str)]
        if not 0 < len(strings) <= 2 or len(rest) > 1:
            raise CalibrationError(where, "not a text, a pair of texts, or one of them with a label", got=len(element))
        yield from _text_rows([strings], [rest[0] if rest else None], where)
    else:
        yield from _text_rows([[element]], [None], where)


def _text_rows(rows: Iterable[Sequence[Any]], labels: Sequence[Any], where: str) -> Iterator[tuple[Text, Any]]:
    for parts, label in zip(rows, labels):
        if odd := [part for part in parts if not isinstance(part, str | None)]:
            raise CalibrationError(where, "not a text", got=type(odd[0]).__name__)
        stripped = [(part or "").strip() for part in parts]
        if all(stripped):
            yield (stripped[0] if len(stripped) == 1 else (stripped[0], stripped[1])), label


def _keep_texts(out: Rows, labels: list[Any]) -> None:
    """Check what was read; labels count where every text has one."""
    if not out.texts:
        raise CalibrationError("calibration", "the data hold no text")
    if any(label is None for label in labels):
        return
    numbers: list[int | float] = []
    for i, label in enumerate(labels):
        number = label.item() if hasattr(label, "item") and np.ndim(label) == 0 else label
        if not isinstance(number, int | float):
            raise CalibrationError(f"calibration row {i}", "a label is no number", got=repr(label)[:60])
        numbers.append(number)
    out.labels = numbers


def _named(element: Any, graph: Graph, where: str) -> dict[str, Any]:
    """An element's tensors by the names of the inputs; those of a tuple are in forward's order, labels last."""
    if isinstance(element, Mapping):
        named = {str(k): v for k, v in element.items()}
        return {**named, "labels": named["label"]} if "label" in named and "labels" not in named else named
    if isinstance(element, Tensor | np.ndarray):
        element = (element,)
    names = (*graph.inputs, "labels")
    if not isinstance(element, list | tuple) or not element:
        raise CalibrationError(
            where, "not a dict of tensors", got=type(element).__name__, wanted="{" + ", ".join(graph.inputs) + "}"
        )
    if len(element) > len(names):
        raise CalibrationError(where, "more tensors than the model takes", got=len(element), wanted=", ".join(names))
    return dict(zip(names, element))


def _rank(value: Any) -> int:
    """Dimensions of a tensor, an array, or lists in lists."""
    if isinstance(value, list | tuple):
        return 1 + (_rank(value[0]) if value else 0)
    return value.ndim if isinstance(value, Tensor | np.ndarray) else 0


def _is_row(named: Mapping[str, Any], ranks: Mapping[str, int]) -> bool:
    """Whether every input that is there has one rank less than the model wants."""
    there = [_rank(named[name]) == rank - 1 for name, rank in ranks.items() if name in named]
    return bool(there) and all(there)


def _is_ragged(named: Mapping[str, Any], graph: Graph) -> bool:
    """Whether an input is a list of rows of different lengths, where the model takes any length."""
    for spec in graph.input_specs():
        value = named.get(spec.name)
        if not isinstance(value, list | tuple) or len(spec.shape) < 2 or isinstance(spec.shape[1], int):
            continue
        if all(_rank(row) == len(spec.shape) - 1 for row in value) and len({len(row) for row in value}) > 1:
            return True
    return False


def _apart(named: Mapping[str, Any], ranks: Mapping[str, int], where: str) -> list[dict[str, Any]]:
    """A batch as rows."""
    parts = {name: value for name, value in named.items() if name in (*ranks, "labels")}
    lengths = {name: len(value) if _rank(value) else 0 for name, value in parts.items()}
    if len(set(lengths.values())) > 1:
        raise CalibrationError(where, "its parts have different numbers of rows", got=lengths)
    return [dict(zip(parts, row)) for row in zip(*parts.values())]


def _length(named: Mapping[str, Any], ranks: Mapping[str, int]) -> int:
    """How many rows a batch has."""
    return next((len(named[name]) for name in ranks if name in named and _rank(named[name])), 1)
