"""Which words of a vocabulary stay: those of a corpus, or those that the caller names.

Before: the group of kind `vocab` of a model. After: the ids that stay, and the one that is read instead of one that went.
    a path or texts   every id that the model's tokenizer makes of them; nothing is left out, whatever its length
    ids               those
    always            the tokenizer's special tokens and its unknown token, and the special ids of the model's own config
The stand-in is the tokenizer's unknown token; without one the padding id, without that the lowest id that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tilecut.read_texts import Text, read_texts
from tilecut.tokenize_texts import load_tokenizer, tokenizer_folder
from tilecut_passes.axes.groups import Group
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import ConfigError

Given = str | tuple[int, ...] | tuple[str, ...]
# More ids than any text has: none is cut off.
NO_LIMIT = 10**9


@dataclass(frozen=True)
class Words:
    """The ids of a vocabulary that stay, in order, and the one that stands for those that go."""

    group: Group
    kept: tuple[int, ...]
    unknown: int

    @property
    def note(self) -> str:
        """What went, for the report."""
        went = self.group.size - len(self.kept)
        return f"{went} of {self.group.size} words went; they are read as id {self.unknown}, and never predicted"


def choose_words(given: Given, groups: Sequence[Group], graph: Graph, model: nn.Module, why: str) -> Words:
    """The words of the model's vocabulary that stay.

    Raises:
        ConfigError: the model has no vocabulary that can be cut (`why`), no tokenizer for texts, or not that id.
        CalibrationError: a corpus that cannot be read.
    """
    group = next((g for g in groups if g.kind == "vocab"), None)
    if group is None:
        raise ConfigError("PruneConfig", "vocabulary is given, but this model's cannot be cut", got=why)
    has_tokenizer = tokenizer_folder(model) is not None
    tokenizer = load_tokenizer(graph, model, NO_LIMIT).encode if has_tokenizer else None
    asked = {i for i in given if isinstance(i, int)}
    if not asked:
        if tokenizer is None:
            raise ConfigError(
                "PruneConfig",
                "vocabulary is text, and the model has no tokenizer beside it",
                fix="load the model from a folder with its tokenizer, or give ids",
            )
        texts = read_texts(Path(given))[0] if isinstance(given, str) else [t for t in given if isinstance(t, str)]
        asked = _ids_of(texts, tokenizer)
    elif odd := [i for i in sorted(asked) if not 0 <= i < group.size]:
        raise ConfigError(
            "PruneConfig", "vocabulary names an id that there is not", got=odd[0], wanted=f"0..{group.size - 1}"
        )
    special = _special_ids(tokenizer, model)
    kept = tuple(sorted(i for i in asked | set(special) if i < group.size))
    unknown = next((i for i in special if i in kept), kept[0])
    return Words(group, kept, unknown)


def _ids_of(texts: Sequence[Text], tokenizer: Any) -> set[int]:
    """Every id of every text, or pair of texts."""
    parts = [part for text in texts for part in ((text,) if isinstance(text, str) else text)]
    return {i for ids in tokenizer(parts, truncation=False)["input_ids"] for i in ids}


def _special_ids(tokenizer: Any, model: nn.Module) -> list[int]:
    """Ids that no text need hold: the unknown token first, then padding, then the others."""
    config = getattr(model, "config", None)
    found: list[Any] = [getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "pad_token_id", None)]
    found += [getattr(config, f"{what}_token_id", None) for what in ("pad", "bos", "eos", "sep", "cls", "mask", "decoder_start")]
    found += getattr(tokenizer, "all_special_ids", [])
    flat = [i for one in found for i in (one if isinstance(one, list | tuple) else [one])]
    return list(dict.fromkeys(int(i) for i in flat if isinstance(i, int) and i >= 0))
