"""Token ids to text, piece by piece, and where a stop string ends it. Needs the `tokenizers` package and a tokenizer.json."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tilecut_runtime.errors import ArtifactError, InputError
from tilecut_runtime.manifest import Manifest

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
# What stands for bytes that are no whole character yet.
BROKEN = "\ufffd"
# So many tokens before a new one decide how it is written: whether a space stands before it.
CONTEXT = 8


def can_tell(manifest: Manifest) -> bool:
    """Whether the artifact has a tokenizer, and this machine the package that reads it."""
    return TOKENIZER in manifest.files and importlib.util.find_spec("tokenizers") is not None


def open_tokenizer(folder: Path, manifest: Manifest, what: str) -> tokenizers.Tokenizer:
    """The artifact's tokenizer, for `what`.

    Raises:
        InputError: the artifact has none, or the package is missing.
        ArtifactError: the file is damaged.
    """
    if TOKENIZER not in manifest.files:
        raise InputError("Session.generate", f"{what}, but the artifact holds no {TOKENIZER}", fix="give token ids")
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as e:
        raise InputError("Session.generate", f"{what}, which needs a package", fix="pip install tokenizers") from e
    manifest.check_files(folder, [TOKENIZER])
    # tokenizers raises a bare Exception.
    try:
        made = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as e:
        raise ArtifactError(str(folder / TOKENIZER), f"tokenizers cannot read it ({e})") from e
    made.no_padding()
    made.no_truncation()
    return made


class StreamText:
    """The text of one row as its tokens come; `ended` once a stop string was written, which is left out of the text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self.tokenizer, self.stops, self.ended = tokenizer, stops, False
        self.ids = [int(token) for token in prompt[-CONTEXT:]]
        self.told, self.read = 0, len(self.ids)
        self.held = ""

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self.ids.append(token)
        before, after = (self._decoded(self.ids[self.told : end]) for end in (self.read, None))
        # A character may have bytes in several tokens.
        if after.endswith(BROKEN) or len(after) <= len(before):
            return ""
        self.told, self.read = self.read, len(self.ids)
        return self._without_stop(after[len(before) :])

    def finish(self) -> str:
        """What was held back."""
        if self.ended:
            return ""
        before, after = (self._decoded(self.ids[self.told : end]) for end in (self.read, None))
        self.read = len(self.ids)
        said = self._without_stop(after[len(before) :])
        said, self.held = said + ("" if self.ended else self.held), ""
        return said

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _without_stop(self, piece: str) -> str:
        text = self.held + piece
        found = min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.ended, self.held = True, ""
            return text[:found]
        # The end of the text may be the beginning of a stop string.
        kept = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]
