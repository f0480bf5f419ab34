"""Perplexity of a small GPT and a small LLaMA, cut by several methods, on files that none of them ever saw.

    python benchmarks/bench_language_models.py [--models gpt llama] [--kept 0.85 0.7 0.5] [--methods table obs ..]

The models are trained first where they are missing (`language_models.py`). Calibration is windows of the text that they
were trained on, without labels; nothing is retrained unless a row says recovered. The LLaMA is also cut evenly: every
layer keeps equally many KV groups, equally many queries in each, and equally many neurons. Every row is a whole compile
for the edge target, judged through `artifact.module()`.

Writes results/language_models.json as it goes and prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from demo import counted
from language_models import (
    MODELS,
    Recipe,
    perplexity,
    read_text,
    sample,
    train_with_bar,
    unigram_perplexity,
    windows,
)
from tilecut import PruneConfig, compile_pruned
from tilecut.describe_machine import machine
from tilecut.recovery_config import Recovery

RESULTS = Path(__file__).parent / "results" / "language_models.json"
METHODS = ("table", "obs", "fisher", "magnitude")
KEPT = (0.85, 0.7, 0.5)
# Rows of a batch, batches to calibrate on, rows to judge on.
ROWS, BATCHES, JUDGED = 8, 128, 256
# Of logits, a KL is enough: hidden states beside it draw it away; and few tokens bear small steps only.
RECOVERY = Recovery.model_validate({"epochs": 3, "learning_rate": 1e-4, "hidden": 0.0})


@dataclass(frozen=True)
class Way:
    """One way to cut: its name in the table, and what it sets in `PruneConfig`."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What one compile gave; perplexity of the dense model is the model's own."""

    model: str
    way: str
    kept_macs: float
    perplexity: float
    ratio: float
    seconds: float
    units: dict[str, list[int]]
    lattice: str


def ways(model: str, methods: Sequence[str], recover: bool) -> Iterator[Way]:
    """The methods side by side, then the first with even layers and with recovery."""
    for method in methods:
        yield Way(method, {"method": method})
    first = methods[0]
    if model == "llama":
        yield Way(f"{first}, even layers", {"method": first, "uniform": True})
    if recover:
        even = model == "llama"
        yield Way(
            f"{first}{', even layers' if even else ''}, recovered",
            {"method": first, "finetune": RECOVERY, "uniform": even},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--kept", nargs="+", type=float, default=KEPT, help="fractions of the prunable MACs that stay")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"calibration batches of {ROWS} windows")
    parser.add_argument("--rows", type=int, default=JUDGED, help="held-out windows to judge on")
    parser.add_argument("--no-recovery", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    recipe, text = Recipe(), read_text()
    models, rows = {}, []
    for name in options.models:
        folder = train_with_bar(name, recipe, text)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        train, test = (windows(list(part.values()), tokenizer, recipe.length) for part in (text.train, text.test))
        judged = sample(test, options.rows)
        chosen = sample(train, options.batches * ROWS, options.seed)
        calibration = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in chosen.split(ROWS)]
        dense = judge(transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval(), judged, f"{name}, dense")
        models[name] = {
            "perplexity": dense,
            "unigram": unigram_perplexity(train, judged, recipe.vocabulary),
            "trained_tokens": recipe.steps * recipe.batch * recipe.length,
            "text_tokens": train.numel(),
            "judged_tokens": judged.numel(),
            "calibration_tokens": chosen.numel(),
        }
        for kept in options.kept:
            for way in ways(name, options.methods, not options.no_recovery):
                rows.append(cut(name, folder, way, kept, calibration, judged, dense, options.seed))
                save(options.output, models, rows, options.seed)
    print("\n".join(table(models, rows)))


def cut(
    name: str,
    folder: Path,
    way: Way,
    kept: float,
    calibration: list[dict[str, torch.Tensor]],
    judged: torch.Tensor,
    dense: float,
    seed: int,
) -> Row:
    """Compile one way and judge the result."""
    config = PruneConfig(sparsity=1 - kept, at={"sequence": judged.shape[1]}, seed=seed, **way.settings)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        artifact = compile_pruned(folder, "edge", None, calibration, config, Path(scratch) / "artifact", measure=False)
        seconds = time.perf_counter() - start
        found = judge(artifact.module(), judged, f"{name}, {way.name}, {kept:.0%}")
        report, plan = artifact.report, artifact.plan
    units: dict[str, list[int]] = {}
    for group in plan.groups:
        if group.kind in config.kinds:
            units.setdefault(group.kind, []).append(group.count)
    macs = report["macs"]["prunable_pruned"] / report["macs"]["prunable_dense"]
    return Row(name, way.name, macs, found, found / dense, seconds, units, report["lattice"])


def judge(model: Any, rows: torch.Tensor, title: str) -> float:
    """Perplexity of a PyTorch model, under a progress bar."""
    with counted(title, len(rows)) as advance:
        return perplexity(
            lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, rows, ROWS, advance
        )


def save(path: Path, models: dict[str, Any], rows: Sequence[Row], seed: int) -> None:
    """Everything measured so far, with the machine and the day."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {
        "machine": machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "recovery": RECOVERY.model_dump(),
        "models": models,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def table(models: dict[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """The rows of RESULTS.md."""
    for name, one in models.items():
        yield f"{name}: dense perplexity {one['perplexity']:.2f} (unigram {one['unigram']:.0f})"
    yield f"lattice: {'; '.join(dict.fromkeys(row.lattice for row in rows))}"
    yield ""
    yield "| model | method | prunable MACs | perplexity | times dense | kept, by layer | s |"
    yield "|" + "---|" * 7
    for row in rows:
        units = "; ".join(f"{kind} {' '.join(map(str, counts))}" for kind, counts in row.units.items())
        yield (
            f"| {row.model} | {row.way} | {row.kept_macs:.1%} | {row.perplexity:.2f} | {row.ratio:.4f} | {units} "
            f"| {row.seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
