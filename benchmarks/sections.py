"""Labelled text to judge a sentence encoder on: Debian package descriptions and the archive section each belongs to.

The judge is fixed: a logistic regression fitted on the dense model's embeddings of the train split. A pruned model is
right where its embedding, given to that head, lands in the right section. The test split is used for nothing else.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

SECTIONS = Path(__file__).parent / "data" / "debian_sections.tsv"
LENGTH, BATCH_SIZE = 128, 64

# input_ids, attention_mask, token_type_ids [B, S] int64 -> last hidden state [B, S, D] fp32
Encoder = Callable[[dict[str, np.ndarray]], np.ndarray]


def read_sections() -> dict[str, tuple[list[str], np.ndarray]]:
    """Texts and labels by split."""
    with SECTIONS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = sorted({row["section"] for row in rows})
    out = {}
    for split in ("train", "test"):
        held = [row for row in rows if row["split"] == split]
        out[split] = [row["description"] for row in held], np.array([names.index(row["section"]) for row in held])
    return out


def embed(encoder: Encoder, tokenizer: Any, texts: list[str], advance: Callable[[int], object]) -> np.ndarray:
    """Mean-pooled, normalised embeddings [N, D], in the order of `texts`; `advance` is told how many were done."""
    ids = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    out: dict[int, np.ndarray] = {}
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        batch = tokenizer(
            [texts[i] for i in chosen], truncation=True, max_length=LENGTH, padding=True, return_tensors="np"
        )
        inputs = {k: v.astype(np.int64) for k, v in batch.items()}
        mask = inputs["attention_mask"][..., None]
        pooled = (encoder(inputs) * mask).sum(1) / mask.sum(1)
        out.update(zip(chosen, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), strict=True))
        advance(len(chosen))
    return np.stack([out[i] for i in range(len(texts))])


@dataclass
class Judge:
    """The dense model's head and its test embeddings."""

    head: LogisticRegression
    texts: list[str]
    labels: np.ndarray
    dense: np.ndarray
    tokenizer: Any

    @classmethod
    def from_dense(cls, encoder: Encoder, folder: Path, advance: Callable[[int], object]) -> Judge:
        """Fit the head on the dense encoder's train embeddings; the tokenizer is in `folder`."""
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        splits = read_sections()
        head = LogisticRegression(max_iter=2000, C=10.0)
        head.fit(embed(encoder, tokenizer, splits["train"][0], advance), splits["train"][1])
        texts, labels = splits["test"]
        return cls(head, texts, labels, embed(encoder, tokenizer, texts, advance), tokenizer)

    def scores(self, encoder: Encoder | None, advance: Callable[[int], object]) -> Mapping[str, float]:
        """Accuracy of the fixed head (0 to 1) and mean cosine to the dense embeddings; None judges the dense model."""
        mine = self.dense if encoder is None else embed(encoder, self.tokenizer, self.texts, advance)
        return {
            "accuracy": float(np.mean(self.head.predict(mine) == self.labels)),
            "cosine": float((mine * self.dense).sum(1).mean()),
        }
