"""Bring a Hugging Face model's config, tokenizer and pooling files along, so that the ecosystem's loaders take the folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from tilecut.load_calibration import tokenizer_folder

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "generation_config.json",
    "chat_template.jinja",
    # sentence-transformers
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def copy_companions(model: nn.Module, folder: Path) -> list[str]:
    """Copy what lies beside the model; returns the names of what was copied."""
    config: Any = getattr(model, "config", None)
    copied = []
    if hasattr(config, "to_json_file"):
        config.to_json_file(str(folder / "config.json"))
        copied.append("config.json")
    source = tokenizer_folder(model)
    if source is None:
        return copied
    pooling = [p.relative_to(source).as_posix() for p in source.glob("*_Pooling/config.json")]
    for name in [*COMPANIONS, *pooling]:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
            copied.append(name)
    return copied
