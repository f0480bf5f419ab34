"""A fine-tuned model on GLUE or SQuAD, dense and cut to several shares of its MACs, without retraining.

    python benchmarks/bench_glue_squad.py MODEL DATA [--keep 0.5] [--methods table fisher]

MODEL is the folder of a fine-tuned sequence classifier (GLUE) or extractive reader (SQuAD v1). DATA is a folder with
`train.jsonl` and `validation.jsonl` (or .parquet) and the columns of Hugging Face's data sets `glue` and `squad`: texts or
pairs with `label`; or `question`, `context`, `answers`. 2,048 training examples calibrate, as in Kwon et al. (arXiv
2204.09656), whose headline is 2.0x fewer FLOPs for less than 1 % in less than 3 minutes. Judged are accuracy (Matthews'
correlation beside it, for CoLA; Pearson's for STS-B), or exact match and F1, through the emitted edge artifact.

Neither the data nor a fine-tuned model comes with tilecut.
"""

from __future__ import annotations

import argparse
import collections
import re
import string
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from datasets import Dataset, load_dataset
from sklearn.metrics import matthews_corrcoef

from tilecut import PruneConfig, compile_pruned, load

TEXTS = ("sentence", "sentence1", "question", "question1", "premise", "text")
PAIRS = ("sentence2", "sentence", "question2", "hypothesis", "text_pair")
CALIBRATED, BATCH, LONGEST_ANSWER = 2048, 32, 30

Example = dict[str, Any]
Runner = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def read_split(folder: Path, split: str) -> Dataset:
    """One split of a data set on disk."""
    for kind, ending in (("json", "jsonl"), ("parquet", "parquet")):
        if (path := folder / f"{split}.{ending}").is_file():
            held = load_dataset(kind, data_files=str(path), split="train")
            assert isinstance(held, Dataset)
            return held
    raise SystemExit(f"{folder}: no {split}.jsonl and no {split}.parquet")


def texts_of(example: Example) -> tuple[str, str | None]:
    """Text and, where there is one, its partner."""
    if "context" in example:
        return example["question"], example["context"]
    first = next(c for c in TEXTS if c in example)
    second = next((c for c in PAIRS if c in example and c != first), None)
    return example[first], example[second] if second else None


def tokenize(tokenizer: Any, examples: Sequence[Example], length: int) -> Any:
    """Texts or pairs; of a pair with a context, the context is what is cut."""
    pairs = [texts_of(e) for e in examples]
    firsts, seconds = [a for a, _ in pairs], [b for _, b in pairs]
    return tokenizer(
        firsts,
        seconds if seconds[0] is not None else None,
        truncation="only_second" if "context" in examples[0] else True,
        max_length=length,
        padding=True,
        return_offsets_mapping="context" in examples[0],
        return_tensors="np",
    )


def run_all(run: Runner, tokenizer: Any, examples: Sequence[Example], names: Sequence[str], length: int) -> list[Any]:
    """Logits of every example, or the answer that a reader gives."""
    out: list[Any] = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        held = tokenize(tokenizer, part, length)
        got = run({n: held[n].astype(np.int64) for n in names})
        if "context" not in part[0]:
            out += list(got["logits"])
            continue
        for i, example in enumerate(part):
            inside = [j for j, s in enumerate(held.sequence_ids(i)) if s == 1]
            offsets = held["offset_mapping"][i]
            out.append(best_answer(got["start_logits"][i], got["end_logits"][i], inside, offsets, example["context"]))
    return out


def best_answer(begin: np.ndarray, end: np.ndarray, inside: Sequence[int], offsets: np.ndarray, context: str) -> str:
    """The span of the context with the highest sum of logits."""
    scores = begin[inside][:, None] + end[inside][None, :]
    allowed = np.triu(np.ones_like(scores, dtype=bool)) & ~np.triu(np.ones_like(scores, dtype=bool), LONGEST_ANSWER)
    first, last = divmod(int(np.where(allowed, scores, -np.inf).argmax()), len(inside))
    return context[offsets[inside[first]][0] : offsets[inside[last]][1]]


def judge(examples: Sequence[Example], answers: Sequence[Any]) -> dict[str, float]:
    """The task's own measures."""
    if "context" in examples[0]:
        found = [[score_answer(a, gold) for gold in e["answers"]["text"]] for e, a in zip(examples, answers)]
        return {
            "exact match": float(np.mean([max(exact for exact, _ in f) for f in found])),
            "F1": float(np.mean([max(f1 for _, f1 in f) for f in found])),
        }
    logits, labels = np.stack(answers), np.array([e["label"] for e in examples])
    if logits.shape[1] == 1:
        return {"Pearson": float(np.corrcoef(logits[:, 0], labels)[0, 1])}
    guesses = logits.argmax(1)
    return {"accuracy": float((guesses == labels).mean()), "Matthews": float(matthews_corrcoef(labels, guesses))}


def score_answer(answer: str, gold: str) -> tuple[bool, float]:
    """Exact match and F1 of words, without case, punctuation and articles, as SQuAD's own script has them."""
    got, want = (_words(x) for x in (answer, gold))
    common = sum((collections.Counter(got) & collections.Counter(want)).values())
    return got == want, 2 * common / (len(got) + len(want)) if common else float(got == want)


def _words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5])
    parser.add_argument("--methods", nargs="+", default=["table", "fisher"])
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(options.model))
    validation: list[Example] = [dict(row) for row in read_split(options.data, "validation")]
    train = read_split(options.data, "train").shuffle(seed=0)
    reads = "context" in train.column_names
    kind = transformers.AutoModelForQuestionAnswering if reads else transformers.AutoModelForSequenceClassification
    model, length = kind.from_pretrained(str(options.model)).eval(), 384 if reads else 128
    chosen: list[Example] = [dict(row) for row in train.select(range(min(CALIBRATED, len(train))))]
    batches = []
    for i in range(0, len(chosen), BATCH):
        held = tokenize(tokenizer, chosen[i : i + BATCH], length)
        held.pop("offset_mapping", None)
        batches.append(dict(held.convert_to_tensors("pt")))
    for method, keep in [("dense", 1.0), *((m, k) for m in options.methods for k in options.keep)]:
        config = None if method == "dense" else PruneConfig(sparsity=1 - keep, method=method, at={"sequence": length})
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            artifact = compile_pruned(model, "edge", None, batches, config, Path(scratch) / "out", measure=False)
            took = time.perf_counter() - start
            session = load(artifact.path)
            names = [spec.name for spec in artifact.manifest.inputs]
            figures = judge(validation, run_all(session.run, tokenizer, validation, names, length))
        if method == "dense":
            print("| method | MACs | seconds | " + " | ".join(figures) + " |")
        print(f"| {method} | {keep:.0%} | {took:.0f} | " + " | ".join(f"{x:.4f}" for x in figures.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
