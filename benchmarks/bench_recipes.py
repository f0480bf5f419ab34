"""Half the parameters of all-MiniLM-L6-v2's encoder, gone by four recipes: what each is worth in speed and accuracy.

    make bench-recipes        or        python benchmarks/bench_recipes.py [--keep 0.5] [--rounds 100]

| recipe | what goes | repair | emitted as |
|---|---|---|---|
| none | nothing | | torch's export |
| structured by magnitude | Torch-Pruning: any width, every layer alike | none | torch's export |
| attention-aware | whole heads and legal widths, layer by layer, by the score `obs` | none | torch's export |
| co-designed | the same lattice, by the cost table | least squares | tilecut's fused emission |

The word table (half of the model's parameters) is left out of the count: none of the recipes cuts it. All forms are timed
in one run, interleaved, in plain `onnxruntime.InferenceSession`s with default options but for the thread count, one
thread, batch 1, 128 tokens. Writes results/recipes.json and prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

import torch_pruning_peer
from demo import console, counted, minilm_folder, torch_encoder
from sections import LENGTH, SECTIONS, Encoder, Judge
from tilecut import PruneConfig, compile_pruned
from tilecut.cut_model import cut_model
from tilecut.describe_machine import machine
from tilecut.prepare import prepare
from tilecut.progress import Progress
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_runtime.timing import time_interleaved
from tilecut_targets.edge import ort_ops
from tilecut_targets.edge.contend import plain_session
from tilecut_targets.find_target import find_target
from tilecut_targets.write_onnx import write_onnx

RESULTS = Path(__file__).parent / "results" / "recipes.json"
NONE, MAGNITUDE, AWARE, CO_DESIGNED = "none", "structured by magnitude", "attention-aware", "co-designed"


def encoder_parameters(model: Any) -> int:
    """Weights and biases of attention and FFN."""
    return sum(p.numel() for p in model.encoder.parameters())


def graph_parameters(graph: Graph) -> int:
    """The same, of a captured graph."""
    return sum(t.numel() for name, t in graph.tensors.items() if name.startswith("encoder."))


def forms(model: Any, folder: Path, keep: float, scratch: Path) -> dict[str, tuple[Path, int]]:
    """An ONNX file for each recipe, and the encoder parameters that it has."""
    dense, total = capture(model), encoder_parameters(model)
    made: dict[str, tuple[Path, int]] = {}

    def export(name: str, graph: Graph) -> None:
        path = scratch / f"{len(made)}.onnx"
        write_onnx(graph, path, ort_ops.ONNX_OPSET, {})
        made[name] = path, graph_parameters(graph)

    export(NONE, dense)
    pruned, _ = torch_pruning_peer.cut(model, "magnitude", keep, LENGTH, [], None, encoder_parameters)
    export(MAGNITUDE, capture(pruned))

    whole = sum(p.numel() for p in model.parameters())
    budget = {"sparsity": None, "max_params": whole - round((1 - keep) * total), "outputs": ("last_hidden_state",)}
    aware = PruneConfig(**budget, method="obs", reconstruct=False)
    ready = prepare(folder, find_target("edge"), None, SECTIONS, aware, None, Progress())
    export(AWARE, cut_model(ready, aware, Progress()).graph)

    artifact = compile_pruned(
        folder, "edge", None, SECTIONS, PruneConfig(**budget), scratch / "artifact", measure=False
    )
    kept = whole - artifact.report["parameters"]["pruned"]
    made[CO_DESIGNED] = artifact.path / "model.onnx", total - kept
    return made


def encoder(path: Path) -> Encoder:
    """An ONNX file as an encoder."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: np.asarray(session.run(["last_hidden_state"], inputs)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the encoder's parameters that stays")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    folder = minilm_folder()
    model: Any = transformers.AutoModel.from_pretrained(str(folder)).eval()
    judge = Judge.from_dense(torch_encoder(model), folder, lambda n: None)
    ids = torch.randint(1000, 20000, (1, LENGTH), generator=torch.Generator().manual_seed(0)).numpy()
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    with tempfile.TemporaryDirectory() as scratch:
        made = forms(model, folder, options.keep, Path(scratch))
        scores = {name: judge.scores(encoder(path), lambda n: None) for name, (path, _) in made.items()}
        sessions = {name: plain_session(path, 1) for name, (path, _) in made.items()}
        runs: dict[str, Callable[[], object]] = {n: (lambda run=run: run(arrays)) for n, run in sessions.items()}
        with counted("time the recipes", options.rounds + 10) as advance:

            def one_round(done: int, of: int) -> None:
                advance(1)

            timings = time_interleaved(runs, options.rounds, 10, one_round)
    rows = [
        {
            "recipe": name,
            "encoder_parameters": parameters,
            "cpu_ms": round(timings[name].cpu_ms, 3),
            "speedup": round(timings[NONE].cpu_ms / timings[name].cpu_ms, 3),
            **{what: round(value, 5) for what, value in scores[name].items()},
            "accuracy_kept": round(scores[name]["accuracy"] / scores[NONE]["accuracy"], 5),
        }
        for name, (_, parameters) in made.items()
    ]
    held = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "lattice": find_target("edge").lattice().describe(),
        "rounds": options.rounds,
        "seconds": round(time.perf_counter() - start),
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    console.print(f"{held['seconds']} s in all; lattice of the last two: {held['lattice']}", highlight=False)
    print("| recipe | encoder parameters | CPU ms | speed-up | accuracy | of dense | cosine |\n" + "|" + "---|" * 7)
    for r in rows:
        print(
            f"| {r['recipe']} | {r['encoder_parameters'] / 1e6:.2f} M | {r['cpu_ms']:.2f} | {r['speedup']:.2f}x "
            f"| {r['accuracy']:.2%} | {r['accuracy_kept']:.1%} | {r['cosine']:.4f} |"
        )


if __name__ == "__main__":
    main()
