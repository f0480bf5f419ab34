"""Decoding with a key-value cache on one thread: dense and cut by half, float32 and int4, beside torch and onnxruntime-genai.

    python benchmarks/bench_generation.py [--rounds 20] [--openings 3] [--tokens 128 512] [--genai FOLDER] [--tiny]

A random model of LLaMA's make: 8 layers, 512 wide, 8 heads on 2 KV groups, 32000 words. Cut by half has half of all its
multiplications, those of the words' layer included: the residual stream is narrowed too. A round lets every contender
read a prompt of so many tokens and decode a few behind it; a contender's figure is the median over rounds of its median
step, in CPU time. All but torch run in a process of their own. Everything is opened anew several times: where a
session's weights come to lie in memory moves a step by some percent, for as long as it is open. A `Session` asks Linux for
huge pages, which genai does not; it runs once more with a C library that is told to.
onnxruntime-genai is installed from PyPI into an environment of its own in FOLDER, which reads torch and transformers from
this one; without --genai it is left out. --tiny is for trying the script out.

Writes results/generation.json and prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from demo import console
from tilecut import PruneConfig, compile_pruned
from tilecut.config import DEFAULT_KINDS
from tilecut.describe_machine import machine

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "generation.json"
STEPS = 16
# Every allocation of glibc asks for huge pages: https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Tokens of a prompt, steps -> CPU milliseconds of the prompt and of a step.
Contender = Callable[[int, int], tuple[float, float]]
Opener = Callable[[], Contender]


def make_model(folder: Path, tiny: bool) -> Any:
    """The model, saved as a Hugging Face folder too, with a tokenizer of single bytes: genai's builder wants one."""
    layers, width, words = (2, 64, 500) if tiny else (8, 512, 32000)
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 * 2 if tiny else 8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    letters = {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = tokenizers.Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, **letters}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.save_pretrained(folder)
    return model


def make_artifact(model: Any, folder: Path, sparsity: float, quantize: str | None) -> Path:
    """An artifact with a cache."""
    # A step of decoding reads every weight once: words' layer and all.
    kinds = (*DEFAULT_KINDS, "hidden") if sparsity else DEFAULT_KINDS
    config = PruneConfig(
        sparsity=sparsity, kinds=kinds, rotate=False, method="magnitude", reconstruct=False, quantize=quantize
    )
    with warnings.catch_warnings():
        # There are no data on purpose.
        warnings.simplefilter("ignore", UserWarning)
        return compile_pruned(model, config=config, output=folder, generate=True, measure=False).path


def torch_contender(model: Any) -> Contender:
    """transformers with its own cache, in torch eager."""

    def run(tokens: int, steps: int) -> tuple[float, float]:
        ids = torch.arange(3, 3 + tokens)[None]
        with torch.no_grad():
            start = time.process_time()
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            prefill, times = time.process_time() - start, []
            for i in range(steps):
                start = time.process_time()
                out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
                times.append(time.process_time() - start)
        return prefill * 1e3, statistics.median(times) * 1e3

    return run


class Worker:
    """A contender in a process of its own: `decode_worker.py` or `genai_worker.py`."""

    def __init__(self, *command: str | Path, environment: Mapping[str, str] = MappingProxyType({})):
        said = [str(part) for part in command]
        self.process = subprocess.Popen(
            said, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self.why = self._line()

    def __del__(self) -> None:
        self.process.kill()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip() or "it ended without a word"

    def __call__(self, tokens: int, steps: int) -> tuple[float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{tokens} {steps}\n")
        self.process.stdin.flush()
        prefill, step = self._line().split()
        return float(prefill), float(step)


def genai_python(folder: Path) -> Path:
    """The interpreter of an environment with onnxruntime-genai, made where there is none.

    Raises:
        CalledProcessError: pip cannot install it.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        (site,) = (folder / "lib").glob("python*/site-packages")
        # Behind its own packages, those of this environment: the builder needs torch and transformers.
        (site / "beside.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
        subprocess.run([str(python), "-m", "pip", "install", "-q", "onnxruntime-genai"], check=True)
    return python


def find_contenders(scratch: Path, genai: Path | None, tiny: bool) -> tuple[dict[str, Opener], dict[str, str]]:
    """What opens each contender, by name, and why others are missing."""
    model = make_model(scratch / "model", tiny)
    found: dict[str, Opener] = {"torch eager": lambda: torch_contender(model)}
    missing: dict[str, str] = {}
    for sparsity in (0.0, 0.5):
        for quantize in (None, "int4"):
            name = f"tilecut {quantize or 'fp32'}{', cut by half' if sparsity else ''}"
            with console.status(f"compile {name}"):
                folder = make_artifact(model, scratch / f"{sparsity}-{quantize}", sparsity, quantize)
            found[name] = partial(Worker, sys.executable, HERE / "decode_worker.py", folder)
    for precision in ("fp32", "int4"):
        name = f"onnxruntime-genai {precision}"
        if genai is None:
            missing[name] = "no --genai"
            continue
        with console.status(f"build {name}"):
            try:
                worker = (genai_python(genai), HERE / "genai_worker.py")
                opener = partial(Worker, *worker, scratch / "model", scratch / f"genai-{precision}", precision)
                made = opener()
            except (OSError, subprocess.CalledProcessError) as e:
                missing[name] = str(e)
                continue
        if made.why == "ready":
            found[name] = opener
            found[f"{name}, huge pages"] = partial(opener, environment=HUGE_PAGES)
        else:
            missing[name] = made.why
    return found, missing


def main() -> None:
    """Time everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--openings", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--genai", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        openers, missing = find_contenders(Path(scratch), args.genai, args.tiny)
        taken: dict[tuple[int, str], list[tuple[float, float]]] = {}
        order = random.Random(0)
        for _ in range(args.openings):
            contenders = {name: opened() for name, opened in openers.items()}
            for tokens in args.tokens:
                for i in range(args.rounds + 2):
                    # In another order every round: what ran before leaves the processor's caches to the next.
                    for name, run in order.sample(list(contenders.items()), len(contenders)):
                        timed = run(tokens, STEPS)
                        # The first two rounds warm up.
                        if i >= 2:
                            taken.setdefault((tokens, name), []).append(timed)
        for tokens in args.tokens:
            for name in openers:
                prefill, step = (statistics.median(one) for one in zip(*taken[tokens, name]))
                rows.append({"name": name, "tokens": tokens, "prefill_ms": round(prefill, 3), "decode_ms": round(step, 3)})
    base = {row["tokens"]: row["decode_ms"] for row in rows if row["name"] == "torch eager"}
    for row in rows:
        ratio = row["decode_ms"] / base[row["tokens"]]
        console.print(f"| {row['name']} | {row['tokens']} | {row['prefill_ms']} | {row['decode_ms']} | {ratio:.2f} |")
    made = {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rounds": args.rounds,
        "openings": args.openings,
        "tiny": args.tiny,
        "missing": missing,
        "rows": rows,
    }
    args.output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
