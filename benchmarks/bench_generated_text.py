"""Perplexity and text of the small LLaMA through artifacts that generate: as it is, cut, and cut with weights of 4 bits.

    python benchmarks/bench_generated_text.py [--sparsity 0.3] [--rows 128]

Perplexity is on files that nothing saw, of three readers: torch (the dense model, or the artifact's module), and the artifact
token by token, each read behind the cache of those before it. The text is the greedy continuation of a line. The model is
trained first where it is missing (`language_models.py`). `gap` is the relative difference of the two perplexities.

Writes results/generated_text.json and prints the rows of RESULTS.md.
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

from bench_language_models import BATCHES, ROWS
from language_models import Recipe, perplexity, read_text, sample, train_with_bar, windows
from tilecut import PruneConfig, compile_pruned, load
from tilecut.describe_machine import machine
from tilecut.whole_texts import WholeTexts

RESULTS = Path(__file__).parent / "results" / "generated_text.json"
PROMPT = "The package contains"
TOKENS, BATCH = 40, 32


def measure(
    folder: Path, name: str, config: PruneConfig | None, calibration: Any, rows: torch.Tensor, scratch: Path
) -> dict[str, Any]:
    """One artifact: perplexity through torch and through its cache, and what it writes."""
    artifact = compile_pruned(folder, "edge", None, calibration, config, scratch / "out", generate=True, measure=False)
    session, module = load(artifact.path), artifact.module()
    through = WholeTexts(session)
    ones = torch.ones_like
    row = {
        "name": name,
        "torch": perplexity(lambda ids: module(input_ids=ids, attention_mask=ones(ids)).logits, rows, BATCH),
        "artifact": perplexity(
            lambda ids: through.run({"input_ids": ids, "attention_mask": ones(ids)})["logits"], rows, BATCH
        ),
        "text": (session.generate(PROMPT, max_new_tokens=TOKENS).texts or [""])[0],
        "parameters": artifact.report["parameters"],
    }
    row["gap"] = abs(row["artifact"] / row["torch"] - 1)
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure all and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    recipe, text = Recipe(), read_text()
    folder = train_with_bar("llama", recipe, text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    train, test = (windows(list(part.values()), tokenizer, recipe.length) for part in (text.train, text.test))
    rows = sample(test, args.rows)
    calibration = [
        {"input_ids": x, "attention_mask": torch.ones_like(x)} for x in sample(train, BATCHES * ROWS).split(ROWS)
    ]
    made = []
    for name, config in (
        ("dense, fp32", None),
        (f"cut {args.sparsity:.0%}, fp32", PruneConfig(sparsity=args.sparsity)),
        (f"cut {args.sparsity:.0%}, int4", PruneConfig(sparsity=args.sparsity, quantize="int4")),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            made.append(measure(folder, name, config, calibration if config else None, rows, Path(scratch)))
    for row in made:
        words = row["text"].replace("\n", " ")
        print(f"| {row['name']} | {row['torch']:.4f} | {row['artifact']:.4f} | {row['gap']:.1e} | {words} |")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "rows": args.rows,
        "prompt": PROMPT,
        "artifacts": made,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
