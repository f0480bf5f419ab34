"""all-MiniLM-L6-v2 with half of its tokens in the upper half of its layers: speed-up at 256 tokens, and the cosine to dense.

    python benchmarks/bench_tokens.py [--rounds 60] [--batches 8]

Texts are descriptions of the test split of data/debian_sections.tsv, joined to rows of 256 tokens, and ragged rows of 32 to
256. Both models are written by the same edge path and run in onnxruntime on one thread, interleaved. The cosine is that of
mean-pooled embeddings. Prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

from demo import counted, minilm_folder
from sections import read_sections
from tilecut import PruneConfig, compile_pruned, load
from tilecut.describe_machine import machine
from tilecut_runtime.timing import Timing, time_interleaved

LENGTH = 256
SCHEDULES: dict[str, dict[int | str, float]] = {
    "half behind layer 2": {2: 0.5},
    "half behind layer 2, a quarter behind layer 4": {2: 0.5, 4: 0.25},
    "half behind layer 0": {0: 0.5},
}


def packed(tokenizer: Any, texts: list[str], lengths: list[int]) -> dict[str, np.ndarray]:
    """Rows of so many real tokens, made of as many texts as that takes, padded on the right."""
    source = iter(texts)
    rows = []
    for length in lengths:
        ids: list[int] = []
        while len(ids) < length - 2:
            ids += tokenizer(next(source), add_special_tokens=False)["input_ids"]
        rows.append([tokenizer.cls_token_id, *ids[: length - 2], tokenizer.sep_token_id])
    longest = max(lengths)
    padded = np.array([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows], dtype=np.int64)
    mask = (np.arange(longest)[None] < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": padded, "attention_mask": mask, "token_type_ids": np.zeros_like(padded)}


def pooled(session: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Mean-pooled embeddings [B, H] of unit length."""
    mask = inputs["attention_mask"][..., None]
    mean = (session.run(inputs)["last_hidden_state"] * mask).sum(1) / mask.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def time_all(sessions: dict[str, Any], inputs: dict[str, np.ndarray], title: str, rounds: int) -> dict[str, Timing]:
    """Every session on the same inputs, interleaved."""
    runs = {name: (lambda session=session: session.run(inputs)) for name, session in sessions.items()}
    with counted(title, rounds + 5) as advance:

        def one_round(done: int, of: int) -> None:
            advance(1)

        return time_interleaved(runs, rounds, 5, one_round)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batches", type=int, default=8, help="of 8 rows, for the cosine")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = read_sections()["test"][0]
    rng = random.Random(0)
    rng.shuffle(texts)
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"dense": compile_pruned(folder, config=None, output=Path(scratch) / "dense", measure=False).path}
        macs = {}
        for name, tokens in SCHEDULES.items():
            # Every unit stays: only tokens go.
            config = PruneConfig(
                sparsity=0, method="magnitude", reconstruct=False, tokens=tokens, at={"sequence": LENGTH}
            )
            made = compile_pruned(folder, config=config, output=Path(scratch) / str(len(paths)), measure=False)
            paths[name] = made.path
            macs |= {"dense": made.report["macs"]["dense"], name: made.report["macs"]["pruned"]}
        sessions = {name: load(path, threads=1) for name, path in paths.items()}
        cosines: dict[tuple[str, str], list[np.ndarray]] = {}
        for i in range(options.batches):
            for kind in ("whole", "ragged"):
                lengths = [LENGTH] * 8 if kind == "whole" else [LENGTH, *(rng.randint(32, LENGTH) for _ in range(7))]
                inputs = packed(tokenizer, texts[i * 200 :], lengths)
                dense = pooled(sessions["dense"], inputs)
                for name, session in sessions.items():
                    cosines.setdefault((name, kind), []).append((dense * pooled(session, inputs)).sum(1))
        rows = {
            "batch 1, 256 tokens": packed(tokenizer, texts, [LENGTH]),
            "batch 8, 32 to 256 tokens": packed(tokenizer, texts, [LENGTH, *range(32, LENGTH, 32)]),
        }
        m = machine()
        print(f"{m['cpu']}, {m['cores']} cores; onnxruntime {onnxruntime.__version__}, torch {torch.__version__}\n")
        print("| inputs | tokens kept | MACs | CPU ms | wall ms | times faster (CPU) | times faster (wall) | cosine to dense |")
        print("|" + "---|" * 8)
        for title, inputs in rows.items():
            timings = time_all(sessions, inputs, title, options.rounds)
            for name, t in timings.items():
                cosine = np.concatenate(cosines[name, "whole" if "batch 1" in title else "ragged"])
                first = timings["dense"]
                print(
                    f"| {title} | {name if name != 'dense' else 'all (dense)'} | {macs[name] / macs['dense']:.3f} "
                    f"| {t.cpu_ms:.2f} | {t.wall_ms:.2f} | {first.cpu_ms / t.cpu_ms:.2f} | {first.wall_ms / t.wall_ms:.2f} "
                    f"| {cosine.mean():.4f} (worst {cosine.min():.4f}) |"
                )


if __name__ == "__main__":
    main()
