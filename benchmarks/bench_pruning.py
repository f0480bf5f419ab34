"""all-MiniLM-L6-v2 cut to 50, 40, 30 and 25 % of its encoder's MACs: ours, the method of Kwon et al., Torch-Pruning.

    make bench-pruning        or        python benchmarks/bench_pruning.py [--seeds 0,1,2] [--methods table,fisher,..]

Everything is judged by `sections.Judge`: mean cosine of the test texts' embeddings to the dense ones, and the accuracy of
a head that was fitted on dense embeddings; and the cosine on general text that nobody fitted. Calibration is the train
split without labels (but for Torch-Pruning, whose Taylor importance needs them). Prints the rows of RESULTS.md and writes
benchmarks/results/pruning.json and pruning.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import torch_pruning_peer
from demo import console, minilm_folder, torch_encoder
from sections import LENGTH, SECTIONS, Encoder, Judge, embed, read_sections
from tilecut import PruneConfig
from tilecut.cut_model import cut_model
from tilecut.describe_machine import machine
from tilecut.mix_texts import MIXTURE, general_passages
from tilecut.prepare import Prepared, prepare
from tilecut.progress import Progress
from tilecut.recovery_config import Recovery
from tilecut_passes.graph import Graph
from tilecut_targets.find_target import find_target

RESULTS = Path(__file__).parent / "results"
KEEP = (0.5, 0.4, 0.3, 0.25)
SILENT = lambda n: None


def graph_encoder(graph: Graph) -> Encoder:
    """A captured graph as an encoder."""
    return lambda inputs: graph.run({k: torch.from_numpy(v) for k, v in inputs.items()})["last_hidden_state"].numpy()


class Bench:
    """The judge, the dense model, and what has been measured."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch = folder, scratch
        self.model: Any = transformers.AutoModel.from_pretrained(str(folder)).eval()
        self.judge = Judge.from_dense(torch_encoder(self.model), folder, SILENT)
        self.general = list(general_passages()[1])
        self.general_dense = embed(torch_encoder(self.model), self.judge.tokenizer, self.general, SILENT)
        self.rows: list[dict[str, Any]] = []
        self.done: list[list[Any]] = []

    def score(self, encoder: Encoder) -> dict[str, float]:
        """Figures of one model."""
        mine = embed(encoder, self.judge.tokenizer, self.general, SILENT)
        return {
            **self.judge.scores(encoder, SILENT),
            "general_cosine": float((mine * self.general_dense).sum(1).mean()),
        }

    def add(self, method: str, seed: int, keep: float, got: float, lattice: str, seconds: dict, encoder: Encoder) -> None:
        """Judge a pruned model and print its row."""
        row = {"method": method, "seed": seed, "keep": keep, "macs": round(got, 4), "lattice": lattice, "seconds": seconds}
        row |= {k: round(v, 5) for k, v in self.score(encoder).items()}
        self.rows.append(row)
        console.print_json(json.dumps(row), indent=None)

    def prepared(self, method: str, seed: int) -> tuple[Prepared, float]:
        """Ours, ready for every budget, with a table of this run's own; and the seconds that it took."""
        start = time.perf_counter()
        config = self.config(method, seed)
        # Kwon et al. take 64 batches.
        data = [batch for batch, _ in self.drawn(seed, 64)] if method == "fisher" else SECTIONS
        made = prepare(self.folder, find_target("edge"), None, data, config, None, Progress())
        return made, time.perf_counter() - start

    def drawn(self, seed: int, batches: int) -> Iterator[tuple[dict[str, torch.Tensor], np.ndarray]]:
        """2,048 texts of the train split at random in so many batches, each with its labels."""
        texts, labels = read_sections()["train"]
        order = np.random.default_rng(seed).permutation(len(texts))[:2048]
        for part in np.split(order, batches):
            held = self.judge.tokenizer(
                [texts[i] for i in part], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
            )
            yield dict(held), labels[part]

    def config(self, method: str, seed: int, keep: float = 0.5, recovery: Recovery | None = None) -> PruneConfig:
        """What is asked of tilecut."""
        # What a sentence encoder is used for; the pooler's output is not.
        used = ("last_hidden_state",)
        # Nothing but the task's own text, as in the paper: general text beside it costs its method much.
        return PruneConfig(
            sparsity=1 - keep,
            method=method,
            outputs=used,
            seed=seed,
            cache=str(self.scratch),
            finetune=recovery,
            mixture=0.0 if method == "fisher" else MIXTURE,
        )

    def ours(self, method: str, seed: int, budgets: Sequence[float], recovery: Recovery | None = None) -> None:
        """Every budget from one table."""
        made, table = self.prepared(method, seed)
        for keep in budgets:
            start = time.perf_counter()
            cut = cut_model(made, self.config(method, seed, keep, recovery), Progress())
            macs = cut.choice.macs()
            name = f"{method} + {recovery.epochs} epochs" if recovery else method
            seconds = {"prepare": round(table, 1), "budget": round(time.perf_counter() - start, 1)}
            share = macs["prunable_pruned"] / macs["prunable_dense"]
            self.add(name, seed, keep, share, cut.choice.lattice.describe(), seconds, graph_encoder(cut.graph))
            for note in cut.notes:
                console.print(f"  note: {note}", highlight=False)

    def peer(self, importance: str, seed: int) -> None:
        """Torch-Pruning."""
        batches = [{**batch, "labels": torch.from_numpy(labels)} for batch, labels in self.drawn(seed, 32)]
        weight, bias = (torch.from_numpy(x).float() for x in (self.judge.head.coef_, self.judge.head.intercept_))
        for keep in KEEP:
            start = time.perf_counter()
            pruned, got = torch_pruning_peer.cut(self.model, importance, keep, 128, batches, (weight, bias))
            seconds = {"budget": round(time.perf_counter() - start, 1)}
            lattice = "whole heads, any number of neurons, every layer alike"
            self.add(f"Torch-Pruning {importance}", seed, keep, got, lattice, seconds, torch_encoder(pruned))


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table: medians over seeds, and the spread."""
    lines = [
        "| method | MACs asked | MACs got | cosine | accuracy | cosine, general text | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((r["method"], r["keep"]) for r in rows)
    for method, keep in keys:
        mine = [r for r in rows if (r["method"], r["keep"]) == (method, keep)]
        cells = [method, f"{keep:.0%}", f"{statistics.median(r['macs'] for r in mine):.4f}"]
        for what, digits in (("cosine", 4), ("accuracy", 4), ("general_cosine", 4)):
            values = [r[what] for r in mine]
            middle, spread = statistics.median(values), max(values) - min(values)
            cells.append(f"{middle:.{digits}f}" + (f" (spread {spread:.{digits}f})" if len(values) > 1 else ""))
        cells.append(" + ".join(f"{statistics.median(r['seconds'][k] for r in mine):.0f}" for k in mine[0]["seconds"]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Cosine over MACs, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        keeps = sorted({r["keep"] for r in mine})
        middle = [statistics.median(r["cosine"] for r in mine if r["keep"] == k) for k in keeps]
        axis.plot([100 * k for k in keeps], middle, marker="o", label=method)
    axis.set_xlabel("encoder MACs kept, %")
    axis.set_ylabel("mean cosine to the dense embeddings")
    axis.set_title("all-MiniLM-L6-v2, test split, no retraining but where said")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def write(bench: Bench, accuracy: float) -> None:
    """What has been measured so far."""
    RESULTS.mkdir(exist_ok=True)
    held = {
        "machine": machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dense_accuracy": accuracy,
        "done": bench.done,
        "rows": bench.rows,
    }
    (RESULTS / "pruning.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    draw(bench.rows, RESULTS / "pruning.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    every = "table,torch-pruning,fisher,recovery,torch-pruning-magnitude"
    parser.add_argument("--methods", default=every, help="of those, what to run, comma-separated")
    parser.add_argument("--resume", action="store_true", help="go on from what results/pruning.json holds")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    seeds, methods = [int(s) for s in options.seeds.split(",")], options.methods.split(",")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(minilm_folder(), Path(scratch))
        if options.resume:
            held = json.loads((RESULTS / "pruning.json").read_text(encoding="utf-8"))
            bench.rows, bench.done = held["rows"], held["done"]
        runs: dict[str, Callable[[int], None]] = {
            "table": lambda seed: bench.ours("table", seed, KEEP),
            "fisher": lambda seed: bench.ours("fisher", seed, KEEP),
            "obs": lambda seed: bench.ours("obs", seed, KEEP),
            "torch-pruning": lambda seed: bench.peer("taylor", seed),
            "torch-pruning-magnitude": lambda seed: bench.peer("magnitude", seed),
            "recovery": lambda seed: bench.ours("table", seed, (0.25,), Recovery(epochs=3)),
        }
        dense = bench.judge.scores(None, SILENT)
        for seed in seeds:
            for method in methods:
                # What is compared is run with every seed; the rest once.
                wanted = seed == seeds[0] or method in ("table", "fisher", "torch-pruning")
                if wanted and [method, seed] not in bench.done:
                    runs[method](seed)
                    bench.done.append([method, seed])
                    write(bench, dense["accuracy"])
    print(f"dense accuracy {dense['accuracy']:.4f}; {time.perf_counter() - start:.0f} s in all")
    print("\n".join(summary(bench.rows)))


if __name__ == "__main__":
    main()
