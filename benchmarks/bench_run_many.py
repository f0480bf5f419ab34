"""Texts of different lengths on the edge target: `Session.run_many` beside one padded batch and beside one text at a time.

    make bench-run-many    or    python benchmarks/bench_run_many.py [--size full|small] [--artifact FOLDER] [--rounds 20]

The texts are descriptions of Debian packages, tokenized, truncated at 128 tokens; the model is all-MiniLM-L6-v2, half of its
prunable MACs cut. One thread; CPU milliseconds for all texts, medians of interleaved rounds. Before anything is timed the
three are compared. `small` is a tiny BERT with random weights on random ids: it keeps this script alive and says nothing
about speed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from rich.table import Table

from demo import console, counted, minilm_folder
from sections import LENGTH, SECTIONS, read_sections
from tilecut import Artifact, PruneConfig, compile_pruned, load
from tilecut.describe_machine import machine
from tilecut_runtime.run_many import MAX_TOKENS, buckets
from tilecut_runtime.session import Session
from tilecut_runtime.timing import time_interleaved

TOLERANCE = 1e-4
MANY, TOGETHER, ALONE = "run_many", "one padded batch", "one text at a time"
Rows = list[dict[str, np.ndarray]]


def real_texts(count: int) -> Rows:
    """Tokenized texts of the test split, spread over it."""
    texts, _ = read_sections()["test"]
    chosen = texts[:: max(len(texts) // count, 1)][:count]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm_folder()))
    ids = tokenizer(chosen, truncation=True, max_length=LENGTH)["input_ids"]
    return [row_of(np.array([one], np.int64)) for one in ids]


def random_texts(count: int) -> Rows:
    """Random ids, lengths uniform in 1..LENGTH."""
    rng = np.random.default_rng(0)
    return [row_of(rng.integers(0, 99, (1, n))) for n in rng.integers(1, LENGTH + 1, count)]


def row_of(ids: np.ndarray) -> dict[str, np.ndarray]:
    """A BERT's inputs of one text."""
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def padded(rows: Rows) -> dict[str, np.ndarray]:
    """All texts in one batch, as long as the longest."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    widen = lambda a: np.pad(a, ((0, 0), (0, longest - a.shape[1])))
    return {name: np.concatenate([widen(row[name]) for row in rows]) for name in rows[0]}


def tiny_model() -> transformers.BertModel:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return transformers.BertModel(config).eval()


def compare(session: Session, rows: Rows) -> float:
    """The largest difference of `run_many` and of the padded batch from every text on its own."""
    whole, many, worst = session.run(padded(rows)), session.run_many(rows), 0.0
    for i, row in enumerate(rows):
        alone, length = session.run(row)["last_hidden_state"], row["input_ids"].shape[1]
        for other in (many[i]["last_hidden_state"], whole["last_hidden_state"][i : i + 1, :length]):
            worst = max(worst, float(np.abs(alone - other).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument(
        "--artifact", type=Path, help="an artifact of all-MiniLM-L6-v2 made before; default: compile one"
    )
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    full = options.size == "full"
    with tempfile.TemporaryDirectory() as scratch:
        artifact = Artifact(options.artifact) if options.artifact is not None else compile_pruned(
            minilm_folder() if full else tiny_model(),
            calibration=SECTIONS if full else None,
            config=PruneConfig(sparsity=0.5) if full else None,
            output=Path(scratch) / "artifact",
            measure=False,
        )  # fmt: skip
        session = load(artifact.path, threads=1)
        rows = real_texts(options.texts) if full else random_texts(options.texts)
        lengths = np.array([row["input_ids"].shape[1] for row in rows])
        worst = compare(session, rows)
        assert worst < TOLERANCE, f"outputs differ by {worst:.1e}"
        batch = padded(rows)
        runs = {
            MANY: lambda: session.run_many(rows),
            TOGETHER: lambda: session.run(batch),
            ALONE: lambda: [session.run(row) for row in rows],
        }
        with counted("rounds", options.rounds + 3) as advance:

            def one_round(done: int, of: int) -> None:
                advance(1)

            times = time_interleaved(runs, options.rounds, 3, one_round)
    divided = buckets(lengths[:, None], MAX_TOKENS)
    tokens = {
        MANY: sum(len(rows) * int(lengths[rows].max()) for rows in divided),
        TOGETHER: len(lengths) * int(lengths.max()),
        ALONE: int(lengths.sum()),
    }
    m = machine()
    quartiles = ", ".join(f"{q:.0f}" for q in np.percentile(lengths, (0, 25, 50, 75, 100)))
    console.print(f"{m['cpu']}; one thread; {len(rows)} texts of {quartiles} tokens (least, quartiles, most)")
    console.print(f"outputs differ by at most {worst:.1e} from those of every text on its own")
    table = Table()
    for name in ("", "runs", "tokens with padding", "CPU ms", "times run_many"):
        table.add_column(name, justify="left" if not name else "right")
    for name, count in ((MANY, len(divided)), (TOGETHER, 1), (ALONE, len(rows))):
        took = times[name].cpu_ms
        table.add_row(name, str(count), str(tokens[name]), f"{took:.1f}", f"{took / times[MANY].cpu_ms:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
