"""All kinds of unit against heads and neurons alone: what is kept at the same measured latency.

    python benchmarks/bench_kinds.py [--models minilm gpt llama] [--sparsities 0.6 0.7 0.8]

Every model is compiled for the edge target with the default kinds and with all of them that it has (head widths, hidden
width, whole branches), to the same fractions of the prunable MACs, by the default method and refit. All artifacts of a
model are timed interleaved in one run, one thread, CPU time; quality is the cosine of embeddings to the dense model's on
the test split of data/debian_sections.tsv (MiniLM), or perplexity on files that nothing saw (the language models of
language_models.py, which are trained first where they are missing). At the latency of each model with default kinds, the
quality of all kinds is read off their own curve, linearly between its two neighbours.

Writes results/kinds.json and prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

from bench_language_models import BATCHES, ROWS, judge
from demo import counted, minilm_folder
from language_models import Recipe, read_text, sample, train_with_bar, windows
from sections import SECTIONS, Encoder, Judge, read_sections
from tilecut import Artifact, PruneConfig, compile_pruned
from tilecut.config import DEFAULT_KINDS, KINDS
from tilecut.describe_machine import machine
from tilecut_runtime.timing import time_interleaved
from tilecut_targets.edge.contend import plain_session

RESULTS = Path(__file__).parent / "results" / "kinds.json"
DENSE, DEFAULT, ALL = "dense", "heads and neurons", "all kinds"
LENGTH, JUDGED = 128, 128


def minilm(seed: int) -> tuple[Any, Any, Callable[[Any], float]]:
    """The model's folder, its calibration, and mean cosine to dense as the judge of an encoder."""
    folder = minilm_folder()
    dense = transformers.AutoModel.from_pretrained(str(folder)).eval()
    splits = read_sections()
    with counted("embed with the dense model", sum(len(texts) for texts, _ in splits.values())) as advance:
        against = Judge.from_dense(encoder_of(dense), folder, advance)
    return folder, SECTIONS, lambda model: float(against.scores(encoder_of(model), lambda n: None)["cosine"])


def encoder_of(model: Any) -> Encoder:
    """A model or an artifact's module as what `Judge` takes."""

    def encode(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return model(**{k: torch.from_numpy(v) for k, v in inputs.items()})["last_hidden_state"].numpy()

    return encode


def language_model(name: str, seed: int) -> tuple[Any, Any, Callable[[Any], float]]:
    """The same for a small language model: perplexity is the judge."""
    recipe, text = Recipe(), read_text()
    folder = train_with_bar(name, recipe, text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    train, test = (windows(list(part.values()), tokenizer, recipe.length) for part in (text.train, text.test))
    chosen = sample(train, BATCHES * ROWS, seed)
    calibration = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in chosen.split(ROWS)]
    judged = sample(test, JUDGED)
    return folder, calibration, lambda model: judge(model, judged, name)


def compare(name: str, sparsities: Sequence[float], seed: int, rounds: int) -> dict[str, Any]:
    """One model: every way at every sparsity, judged and timed side by side."""
    folder, calibration, quality = minilm(seed) if name == "minilm" else language_model(name, seed)
    loader = transformers.AutoModel if name == "minilm" else transformers.AutoModelForCausalLM
    dense = loader.from_pretrained(str(folder)).eval()
    rows: list[dict[str, Any]] = [{"way": DENSE, "sparsity": 0.0, "quality": quality(dense)}]
    with tempfile.TemporaryDirectory() as scratch:
        made: list[Path] = []

        def compiled(config: PruneConfig | None) -> Artifact:
            made.append(Path(scratch) / str(len(made)))
            return compile_pruned(dense if config is None else folder, "edge", None, calibration, config, made[-1], measure=False)

        compiled(None)
        for sparsity in sparsities:
            for way, kinds in ((DEFAULT, DEFAULT_KINDS), (ALL, tuple(k for k in KINDS if k != "vocab"))):
                config = PruneConfig(sparsity=sparsity, kinds=kinds, at={"sequence": LENGTH}, seed=seed)
                artifact = compiled(config)
                report = artifact.report
                rows.append(
                    {
                        "way": way,
                        "sparsity": sparsity,
                        "quality": quality(artifact.module()),
                        "macs": report["macs"],
                        "kinds": report["kinds"],
                        "parameters": report["parameters"],
                        "predicted_loss": report["predicted_loss"],
                        "seconds": sum(report["seconds"].values()),
                    }
                )
                print(json.dumps({"model": name, **rows[-1]}), flush=True)
        ids = torch.randint(1000, 4000, (1, LENGTH), generator=torch.Generator().manual_seed(0)).numpy()
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        runs: dict[str, Callable[[], object]] = {}
        for i, path in enumerate(made):
            inputs = {spec.name: given[spec.name] for spec in Artifact(path).manifest.inputs}
            session = plain_session(path / "model.onnx", 1)
            runs[str(i)] = lambda run=session, inputs=inputs: run(inputs)
        with counted("time the artifacts", rounds + 10) as advance:

            def one_round(done: int, of: int) -> None:
                advance(1)

            timings = time_interleaved(runs, rounds, 10, one_round)
    for i, row in enumerate(rows):
        row["ms"] = timings[str(i)].cpu_ms
    return {"quality": "cosine" if name == "minilm" else "perplexity", "rows": rows, "at_same_latency": same_latency(rows)}


def same_latency(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """At the latency of every model of default kinds: its quality, and that of all kinds, read off their curve."""
    curve = sorted((r["ms"], r["quality"]) for r in rows if r["way"] in (ALL, DENSE))
    ms, quality = (np.array(column) for column in zip(*curve))
    return [
        {
            "sparsity": r["sparsity"],
            "ms": r["ms"],
            DEFAULT: r["quality"],
            # Outside of the curve nothing is claimed.
            ALL: float(np.interp(r["ms"], ms, quality, left=np.nan, right=np.nan)),
        }
        for r in rows
        if r["way"] == DEFAULT
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "gpt", "llama"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.6, 0.7, 0.8])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    kept = json.loads(options.output.read_text(encoding="utf-8"))["models"] if options.output.exists() else {}
    for name in options.models:
        kept[name] = compare(name, options.sparsities, options.seed, options.rounds)
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            "sequence": LENGTH,
            "rounds": options.rounds,
            "models": kept,
        }
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(kept))


def table(models: Mapping[str, Any]) -> str:
    """The rows in Markdown, and the comparison at the same latency."""
    lines = ["| model | way | MACs | of dense time | quality |", "|" + "---|" * 5]
    for name, one in models.items():
        dense = one["rows"][0]
        for r in one["rows"]:
            macs = r["macs"]["pruned"] / r["macs"]["dense"] if "macs" in r else 1.0
            quality = f"{one['quality']} {r['quality']:.4g}"
            lines.append(f"| {name} | {r['way']} | {macs:.0%} | {r['ms'] / dense['ms']:.3f} | {quality} |")
    lines += ["", f"| model | at ms of | {DEFAULT} | {ALL} |", "|" + "---|" * 4]
    for name, one in models.items():
        lines += [f"| {name} | {r['sparsity']:.0%} cut | {r[DEFAULT]:.4g} | {r[ALL]:.4g} |" for r in one["at_same_latency"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
