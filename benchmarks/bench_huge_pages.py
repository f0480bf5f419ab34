"""What huge pages give a `Session`: one artifact opened with them and without them, in processes of their own.

    python benchmarks/bench_huge_pages.py [--openings 8] [--rounds 40]

all-MiniLM-L6-v2, one thread: medians over openings, which take turns, of CPU milliseconds, seconds of opening, and the
process's largest size. A decoder's tokens gain most: `bench_generation.py`. Prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tilecut.measure_memory import peak_bytes
from tilecut_runtime import huge_pages
from tilecut_runtime.session import load
from tilecut_runtime.timing import time_interleaved

TOKENS = (8, 32, 128)
WITH, WITHOUT = "with", "without"


def open_and_run(path: str, way: str, rounds: int) -> list[float]:
    """Milliseconds of one text of each length, seconds of opening, megabytes of this process."""
    if way == WITHOUT:
        huge_pages.SETTINGS = Path("/no/such/setting")
    start = time.perf_counter()
    session = load(path, threads=1)
    opening = time.perf_counter() - start
    runs = {}
    for tokens in TOKENS:
        ids = np.random.default_rng(0).integers(1000, 20000, (1, tokens))
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        runs[str(tokens)] = lambda given=given: session.run(given)
    times = time_interleaved(runs, rounds, 5).values()
    return [*(one.cpu_ms for one in times), opening, peak_bytes() / 1e6]


def compare(path: Path, openings: int, rounds: int) -> dict[str, list[float]]:
    """What `open_and_run` says of both ways."""
    said: dict[str, list[list[float]]] = {WITHOUT: [], WITH: []}
    for _ in range(openings):
        for way, lines in said.items():
            command = [sys.executable, __file__, "--artifact", str(path), "--way", way, "--rounds", str(rounds)]
            lines.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return {way: [statistics.median(column) for column in zip(*lines)] for way, lines in said.items()}


def main() -> None:
    """Time both ways and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openings", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--artifact", help="open this one and print its figures, as a process of its own does")
    parser.add_argument("--way", choices=(WITH, WITHOUT), default=WITH)
    args = parser.parse_args()
    if args.artifact:
        print(json.dumps(open_and_run(args.artifact, args.way, args.rounds)))
        return
    import transformers

    from demo import console, minilm_folder
    from tilecut import PruneConfig, compile_pruned

    model = transformers.AutoModel.from_pretrained(str(minilm_folder())).eval()
    columns = [*(f"{tokens} tokens, ms" for tokens in TOKENS), "opening, s", "process, MB"]
    console.print("| MiniLM | huge pages | " + " | ".join(columns) + " |", soft_wrap=True)
    console.print("|" + "---|" * (2 + len(columns)))
    for quantize in (None, "int8"):
        with tempfile.TemporaryDirectory() as scratch, console.status(quantize or "fp32"):
            config = PruneConfig(sparsity=0.0, quantize=quantize)
            path = compile_pruned(model, config=config, output=Path(scratch) / "artifact", measure=False).path
            said = compare(path, args.openings, args.rounds)
        for way, figures in said.items():
            row = [quantize or "fp32", way, *(f"{one:.2f}" for one in figures[:-1]), f"{figures[-1]:.0f}"]
            console.print("| " + " | ".join(row) + " |", soft_wrap=True)


if __name__ == "__main__":
    main()
