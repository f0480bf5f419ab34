"""Calibration from whatever the caller has: to fit with, held out in the caller's domain, and held out general text.

    a path                     a file of texts (`read_texts.py`)
    an object in memory        texts, rows or batches: data sets, DataLoaders, lists, streams (`read_rows.py`)
    None                       the general text shipped with tilecut when the model has a tokenizer, else nothing

Texts are tokenized with the model's tokenizer, and with rows of ids they are sorted by length into batches. A tenth of the
rows is held out, of batches every tenth; a row that is fitted is never held out. Where the model has a tokenizer, general
text is added to what is fitted (`mix_texts.py`); it has no labels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tilecut.batch_rows import Row, batch_rows
from tilecut.mix_texts import GENERAL, MIXTURE, general_passages, mixed_in
from tilecut.read_rows import MAX_ROWS, Rows, read_rows
from tilecut.read_texts import read_texts
from tilecut.tokenize_texts import Tokenizer, load_tokenizer, tokenizer_folder, why_no_text
from tilecut_passes.align_labels import scored_output
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import CalibrationError

__all__ = ["Calibration", "load_calibration", "read_texts", "tokenizer_folder"]

HELD_OUT = 0.1
# Fewer rows, or batches, than these leave nothing to hold out.
HOLD_OUT_FROM_ROWS, HOLD_OUT_FROM_BATCHES = 20, 8
TOO_FEW = "too few to hold any out"
# Text of which more than this is unknown to the tokenizer is none that the model was made for.
MAX_UNKNOWN = 0.2


@dataclass(frozen=True)
class Calibration:
    """Batches to fit with, batches held out, and a line that says what they are.

    Attributes:
        fit: the caller's data and the general text that is mixed in.
        held_out: the caller's data that is not fitted; what is fitted where there is too little.
        general: general text that is not fitted; [] where the model has no tokenizer or takes no text.
        notes: what was left out of the caller's data, and why.
    """

    fit: list[Batch]
    held_out: list[Batch]
    source: str
    general: list[Batch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Real positions in the batches to fit with."""
        return sum(batch.positions for batch in self.fit)

    @property
    def scoring(self) -> list[Batch]:
        """The batches to fit with that have labels, when any has; else all: losses of one scale."""
        return [b for b in self.fit if b.labels is not None] or self.fit


def load_calibration(
    given: Any, graph: Graph, model: nn.Module, sequence: int, seed: int = 0, mixture: float = MIXTURE
) -> Calibration | None:
    """Calibration that fits the graph's inputs, or None when there is none to be had.

    Args:
        sequence: texts are cut to this many tokens.
        mixture: the fraction of the fitted tokens that is general text.

    Raises:
        CalibrationError: a file that cannot be read, texts without a tokenizer, or data that do not fit the model.
    """
    obstacle = why_no_text(graph, model)
    if given is None:
        return _general_alone(graph, load_tokenizer(graph, model, sequence), seed) if obstacle is None else None
    if isinstance(given, str | Path):
        texts, labels = read_texts(Path(given))
        read, name = Rows(texts=texts, labels=list(labels) if labels else None), Path(given).name
    else:
        read, name = read_rows(given, graph, seed), ""
    if read.texts and obstacle is not None:
        raise CalibrationError(
            "calibration",
            f"{name or 'texts'}: {obstacle}",
            fix="load the model from a folder with its tokenizer, or pass tokenized batches",
        )
    tokenizer = None
    if obstacle is None:
        try:
            tokenizer = load_tokenizer(graph, model, sequence)
        except CalibrationError as e:
            # The caller's own tensors need no tokenizer.
            if read.texts:
                raise
            obstacle = str(e)
    own = _own(read, name, graph, tokenizer, seed)
    if tokenizer is None:
        unmixed = mixture > 0 and "input_ids" in graph.inputs
        source = f"{own.source}; no general text: {obstacle}" if unmixed else own.source
        return Calibration(own.fit, own.held_out, source, [], own.notes)
    return _mixed(own, graph, tokenizer, mixture, seed)


def _general_alone(graph: Graph, tokenizer: Tokenizer, seed: int) -> Calibration:
    passages, held = (tokenizer.rows(texts) for texts in general_passages())
    fit, general = (batch_rows(graph, rows, tokenizer.pad, tokenizer.start) for rows in (passages, held))
    random.Random(seed).shuffle(fit)
    return Calibration(fit, general, f"{len(passages)} {GENERAL}", general)


def _own(read: Rows, name: str, graph: Graph, tokenizer: Tokenizer | None, seed: int) -> Calibration:
    """The caller's data alone."""
    notes = list(read.notes)
    if read.batches:
        batches = check_batches(graph, read.batches)
        every = round(1 / HELD_OUT)
        # Every tenth batch, so that batches sorted by length are held out evenly.
        held = [b for i, b in enumerate(batches) if i % every == every // 2]
        if len(batches) < HOLD_OUT_FROM_BATCHES:
            return Calibration(batches, batches, f"{len(batches)} batches ({TOO_FEW})", notes=notes)
        fit = [b for i, b in enumerate(batches) if i % every != every // 2]
        return Calibration(fit, held, f"{len(batches)} batches", notes=notes)
    rows: list[Row] = list(read.rows)
    source = f"{len(rows)} rows"
    if read.texts:
        assert tokenizer is not None
        order = random.Random(seed).sample(range(len(read.texts)), min(len(read.texts), MAX_ROWS))
        labels = [read.labels[i] for i in order] if read.labels and _takes_labels(graph, notes) else None
        rows = [*tokenizer.rows([read.texts[i] for i in order], labels)]
        source = f"{name}, {len(rows)} texts" if name else f"{len(rows)} texts"
        if not rows:
            raise CalibrationError("calibration", "the tokenizer makes no token of any text")
    pad, start = (tokenizer.pad, tokenizer.start) if tokenizer else (0, None)
    fit, held = hold_out(rows, graph, seed)
    batches = batch_rows(graph, fit, pad, start)
    if not held:
        return Calibration(batches, batches, f"{source} ({TOO_FEW})", notes=notes)
    random.Random(seed).shuffle(batches)
    return Calibration(batches, batch_rows(graph, held, pad, start), source, notes=notes)


def _mixed(own: Calibration, graph: Graph, tokenizer: Tokenizer, mixture: float, seed: int) -> Calibration:
    """The caller's data with general text beside them."""
    passages, held = general_passages()
    rest = tokenizer.rows(held)
    if tokenizer.unknown_share(rest) > MAX_UNKNOWN:
        return Calibration(
            own.fit, own.held_out, f"{own.source}; no general text: its words are unknown", [], own.notes
        )
    rows = mixed_in(tokenizer.rows(passages), lambda row: len(row["input_ids"]), own.tokens, mixture, seed)
    fit = [*own.fit, *(batch_rows(graph, rows, tokenizer.pad, tokenizer.start) if rows else [])]
    # Any part of the batches is then like the whole.
    random.Random(seed).shuffle(fit)
    source = f"{own.source}, and {len(rows)} {GENERAL}" if rows else own.source
    return Calibration(fit, own.held_out, source, batch_rows(graph, rest, tokenizer.pad, tokenizer.start), own.notes)


def _takes_labels(graph: Graph, notes: list[str]) -> bool:
    """Whether one label a text is what the output is compared with; said in the notes where it is not."""
    name = scored_output(graph.outputs)
    spec = next(s for s in graph.output_specs() if s.name == name)
    if len(spec.shape) == 2:
        return True
    notes.append(f"labels were not used: the output {spec} has no row for a label a text")
    return False


def hold_out(rows: Sequence[Row], graph: Graph, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to fit with, and a tenth that equals none of them; none of too few."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    count = round(HELD_OUT * len(rows)) if len(rows) >= HOLD_OUT_FROM_ROWS else 0
    fit = [rows[i] for i in order[count:]]
    seen = {_key(row, graph) for row in fit}
    held = [rows[i] for i in order[:count] if _key(rows[i], graph) not in seen]
    return (fit, held) if held else (list(rows), [])


def _key(row: Row, graph: Graph) -> bytes:
    """What makes two rows the same: their first input."""
    return b"".join(np.asarray(row[name]).tobytes() for name in graph.inputs[:1] if name in row)
