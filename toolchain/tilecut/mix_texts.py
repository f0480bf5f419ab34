"""The general text that tilecut ships (WordNet glosses, `data/LICENSE-general.md`), and how much of it is mixed in.

A refit on in-domain text alone forgets other text, so a part of what is fitted is general: `mixture` of the texts. To be
that part of the tokens too, general texts are as long as the caller's: glosses, joined until they have as many words.
Every eighth passage is held out to measure fidelity on, whatever the seed: it is never fitted.
"""

from __future__ import annotations

import functools
import random
import re
from importlib import resources

GENERAL = "general texts (WordNet glosses, shipped with tilecut)"
HELD_OUT_EVERY = 8
# What ends a gloss and begins the next one: `.. gloss. word: gloss`.
_NEXT = re.compile(r'\. (?=[^.:;"()]{1,60}: )')


@functools.cache
def general_passages() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Passages to fit with, and passages that are held out."""
    lines = (resources.files("tilecut.data") / "general.txt").read_text(encoding="utf-8").splitlines()
    held = lines[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return tuple(line for i, line in enumerate(lines) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2), tuple(held)


def mixed_in(count: int, mixture: float) -> int:
    """How many general texts make `mixture` of all texts beside `count` others."""
    return round(count * mixture / (1 - mixture))


def general_texts(count: int, words: float, seed: int) -> list[str]:
    """At most `count` texts of about `words` words or one gloss, drawn at random from the passages to fit with."""
    glosses = [gloss.rstrip(".") for passage in general_passages()[0] for gloss in _NEXT.split(passage)]
    random.Random(seed).shuffle(glosses)
    texts, parts, length = [], [], 0
    for gloss in glosses:
        if len(texts) == count:
            break
        # A gloss that takes a text farther from the wanted length begins the next text.
        more = len(gloss.split())
        if parts and length + more / 2 > words:
            texts.append(". ".join(parts) + ".")
            parts, length = [], 0
        parts.append(gloss)
        length += more
    return texts
