"""Latency budgets on all-MiniLM-L6-v2: asked for X ms, what does the artifact take?

    python benchmarks/bench_latency_budget.py [--fractions 0.75 0.5 0.3] [--threads 1] [--sequence 128]

Measures the edge target's cost model on this machine, asks for fractions of the dense latency that it states, compiles
each, and times the artifacts and the dense model interleaved in one run of plain `onnxruntime.InferenceSession`s with
default options but for the thread count. A machine's speed changes between the runs that made the cost model and this
one, so figures are ratios to dense. Which units go does not change the time: the method is magnitude, without refit.

Writes results/latency_budget.json and prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

from demo import console, counted, minilm_folder
from tilecut import Artifact, PruneConfig, compile_pruned
from tilecut.describe_machine import machine
from tilecut_runtime.timing import Timing, time_interleaved
from tilecut_targets.cost_model import CostModel, clock, latency_ms
from tilecut_targets.edge.contend import plain_session

RESULTS = Path(__file__).parent / "results" / "latency_budget.json"
DENSE = "dense"


def compiled(model: Any, config: PruneConfig | None, output: Path) -> Artifact:
    """An artifact of the edge target."""
    title = f"compile for {config.max_latency_ms:.4g} ms" if config and config.max_latency_ms else "compile dense"
    with console.status(title), warnings.catch_warnings():
        # There are no data on purpose: magnitude needs none.
        warnings.simplefilter("ignore", UserWarning)
        return compile_pruned(model, config=config, output=output, measure=False)


def time_all(artifacts: Mapping[str, Artifact], at: Mapping[str, int], rounds: int) -> dict[str, Timing]:
    """Every artifact, interleaved."""
    shape = (at["batch"], at["sequence"])
    ids = torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0)).numpy()
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    runs: dict[str, Callable[[], object]] = {}
    for name, artifact in artifacts.items():
        session = plain_session(artifact.path / "model.onnx", at["threads"])
        runs[name] = lambda run=session: run(arrays)
    with counted("time the artifacts", rounds + 10) as advance:

        def one_round(done: int, of: int) -> None:
            advance(1)

        return time_interleaved(runs, rounds, 10, one_round)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.75, 0.5, 0.3], help="of the dense latency")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--method", default="magnitude", help="what chooses the units")
    parser.add_argument("--cache", type=Path, help="folder of cost models; default: measure anew")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(str(minilm_folder())).eval()
    at = {"batch": options.batch, "sequence": options.sequence, "threads": options.threads}
    rows, artifacts = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        cache = options.cache or Path(scratch) / "cache"
        settings = {"at": at, "method": options.method, "reconstruct": False, "cache": str(cache)}
        artifacts[DENSE] = compiled(model, None, Path(scratch) / DENSE)
        start = time.perf_counter()
        # Whatever the budget, the cost model is measured first; this one fits any model.
        whole = compiled(model, PruneConfig(max_latency_ms=1e9, **settings), Path(scratch) / "whole").report
        seconds = whole["seconds"]["cost model"]
        console.print(f"cost model measured in {seconds:.0f} s of {time.perf_counter() - start:.0f} s")
        cost = CostModel.from_json(whole["cost_model"])
        dense_ms = whole["predicted_ms"]["dense"]
        for fraction in options.fractions:
            config = PruneConfig(max_latency_ms=fraction * dense_ms, **settings)
            artifact = compiled(model, config, Path(scratch) / str(fraction))
            artifacts[str(fraction)] = artifact
            rows.append(
                {
                    "asked_ms": fraction * dense_ms,
                    "predicted_ms": artifact.report["predicted_ms"]["pruned"],
                    "kept": [g["kept"] for g in artifact.report["groups"]],
                    "seconds": sum(artifact.report["seconds"].values()),
                    "macs": artifact.report["macs"]["pruned"] / artifact.report["macs"]["dense"],
                }
            )
        timings = {name: latency_ms(t, options.threads) for name, t in time_all(artifacts, at, options.rounds).items()}
    for fraction, row in zip(options.fractions, rows):
        measured = timings[str(fraction)]
        row |= {
            "measured_ms": measured,
            "asked_ratio": fraction,
            "predicted_ratio": row["predicted_ms"] / dense_ms,
            "measured_ratio": measured / timings[DENSE],
            "measured_over_asked": measured / timings[DENSE] / fraction,
        }
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "at": at,
        "clock": clock(options.threads),
        "rounds": options.rounds,
        "method": options.method,
        "lattice": whole["lattice"],
        "cost_model_seconds": seconds,
        "dense_ms": {"predicted": dense_ms, "measured": timings[DENSE]},
        "rows": rows,
        "cost_model": cost.as_json(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def table(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    at, dense, cost = result["at"], result["dense_ms"], result["cost_model"]
    lines = [
        f"{result['machine']['cpu']}; {at}; {result['clock']} time, medians of {result['rounds']} rounds; "
        f"lattice: {result['lattice']}; cost model measured in {result['cost_model_seconds']:.0f} s, its worst "
        f"prediction of a whole model off by {cost['worst_error']:.1%}; dense: predicted {dense['predicted']:.2f} ms, "
        f"measured {dense['measured']:.2f} ms",
        "",
        "| asked ms | asked / dense | predicted / dense | measured / dense | measured over asked | MACs / dense |",
        "|" + "---|" * 6,
    ]
    lines += [
        f"| {r['asked_ms']:.2f} | {r['asked_ratio']:.3f} | {r['predicted_ratio']:.3f} | {r['measured_ratio']:.3f} "
        f"| {r['measured_over_asked']:.3f} | {r['macs']:.3f} |"
        for r in result["rows"]
    ]
    lines += ["", "| whole model | measured ms | predicted ms | ratio |", "|" + "---|" * 4]
    lines += [
        f"| {c['name']} | {c['measured']:.2f} | {c['predicted']:.2f} | {c['ratio']:.3f} |" for c in cost["validation"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
