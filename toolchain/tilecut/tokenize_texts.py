"""The model's own tokenizer: where it lies, and texts as rows of ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tilecut.batch_rows import DERIVED
from tilecut.read_texts import Text
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import CalibrationError, first_line

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, the length it cuts texts to, and the ids that pad a row and begin a decoder's."""

    encode: Any
    length: int
    pad: int
    start: int | None
    unknown: int | None

    def rows(self, texts: Sequence[Text], labels: Sequence[int | float] | None = None) -> list[dict[str, Any]]:
        """A row a text; texts without any token are left out."""
        firsts = [text if isinstance(text, str) else text[0] for text in texts]
        seconds = [text[1] for text in texts if not isinstance(text, str)]
        if seconds and len(seconds) < len(texts):
            raise CalibrationError("calibration", "single texts and pairs of texts are mixed")
        try:
            held = self.encode(firsts, seconds or None, truncation=True, max_length=self.length)
        # A tokenizer may be made for one text only, or need more than it was given.
        except Exception as e:
            raise CalibrationError("calibration", f"the model's tokenizer fails: {first_line(e)}") from e
        rows = [dict(zip(held, values)) for values in zip(*held.values())]
        if labels is not None:
            rows = [{**row, "labels": label} for row, label in zip(rows, labels, strict=True)]
        return [row for row in rows if len(row["input_ids"])]

    def unknown_share(self, rows: Sequence[dict[str, Any]]) -> float:
        """The share of ids that stand for no token of the vocabulary."""
        ids = [i for row in rows for i in row["input_ids"]]
        return sum(i == self.unknown for i in ids) / max(len(ids), 1) if self.unknown is not None else 0.0


def tokenizer_folder(model: nn.Module) -> Path | None:
    """The folder that the model came from, when a tokenizer lies in it."""
    config = getattr(model, "config", None)
    name = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not name or not Path(name).is_dir():
        return None
    return Path(name) if any((Path(name) / f).is_file() for f in TOKENIZER_FILES) else None


def why_no_text(graph: Graph, model: nn.Module) -> str | None:
    """Why the model cannot be given texts; None where it can."""
    if "input_ids" not in graph.inputs:
        return "the model takes no input_ids"
    if other := [name for name in graph.inputs if name not in ("input_ids", *DERIVED, *graph.hiding)]:
        return f"the model takes more than texts ({', '.join(other[:3])})"
    if tokenizer_folder(model) is None:
        return "the model has no tokenizer beside it"
    return None


def load_tokenizer(graph: Graph, model: nn.Module, sequence: int) -> Tokenizer:
    """The tokenizer beside the model; texts are cut to `sequence` ids, or to what the model allows.

    Raises:
        CalibrationError: its files are damaged.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(model)
    try:
        found: Any = AutoTokenizer.from_pretrained(str(folder))
    # Damaged files fail wherever transformers first trips over them.
    except Exception as e:
        raise CalibrationError(str(folder), f"transformers cannot load the tokenizer: {first_line(e)}") from e
    limits = [r.max for name, r in graph.ranges.items() if name.endswith("sequence") and r.max is not None]
    pad = next((i for i in (found.pad_token_id, found.eos_token_id) if i is not None), 0)
    config = getattr(model, "config", None)
    start = getattr(config, "decoder_start_token_id", None)
    return Tokenizer(found, min([sequence, *limits]), pad, start, found.unk_token_id)
