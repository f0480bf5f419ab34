"""Perplexity of the small language models with a narrower residual stream: channels as they are, or principal components.

    python benchmarks/bench_hidden.py [--models gpt llama] [--kept 0.75 0.5625]

Nothing but the hidden width is cut, by the default method, with the default refit; calibration is windows of the text that
the models were trained on, and perplexity is on files that nothing saw. The models are trained first where they are missing
(`language_models.py`). Both tie their tables, which channels keep tied and components untie.

Writes results/hidden.json and prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from bench_kinds import language_model
from language_models import Recipe
from tilecut import PruneConfig, compile_pruned
from tilecut.describe_machine import machine

RESULTS = Path(__file__).parent / "results" / "hidden.json"
# Widths are multiples of this.
BLOCK = 16


def measure(name: str, kept: list[float], seed: int) -> list[dict[str, Any]]:
    """A row for the dense model, and one for every width, by channels and by components."""
    folder, calibration, quality = language_model(name, seed)
    dense = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    width = dense.config.hidden_size
    rows: list[dict[str, Any]] = [{"model": name, "kept": width, "of": width, "perplexity": quality(dense)}]
    for share in kept:
        for rotate in (False, True):
            most = int(share * width) // BLOCK * BLOCK
            config = PruneConfig(
                kinds=("hidden",), sparsity=0.0, max_units={"hidden": most}, rotate=rotate, at={"sequence": Recipe().length}
            )
            with tempfile.TemporaryDirectory() as scratch:
                artifact = compile_pruned(folder, "edge", None, calibration, config, Path(scratch) / "out", measure=False)
                rows.append(
                    {
                        "model": name,
                        "rotate": rotate,
                        "kept": most,
                        "of": width,
                        "perplexity": quality(artifact.module()),
                        "parameters": artifact.report["parameters"],
                        "notes": artifact.report["notes"],
                    }
                )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| model | channels | units are | parameters | perplexity |", "|" + "---|" * 5]
    for r in rows:
        units = {None: "dense", False: "channels", True: "components"}[r.get("rotate")]
        count = f"{r['parameters']['pruned']:,}" if "parameters" in r else ""
        lines.append(f"| {r['model']} | {r['kept']} of {r['of']} | {units} | {count} | {r['perplexity']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt", "llama"])
    parser.add_argument("--kept", nargs="+", type=float, default=[0.75, 0.5625])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [row for name in options.models for row in measure(name, options.kept, options.seed)]
    held = {"date": datetime.date.today().isoformat(), "machine": machine(), "torch": torch.__version__, "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
