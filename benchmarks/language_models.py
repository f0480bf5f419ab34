"""Two small language models that any machine can train, and the judge of both: perplexity on files they never saw.

    python benchmarks/language_models.py train --model gpt|llama

The text is the Python standard library of the interpreter at hand (sources with their docstrings), without its tests
and without installed packages, file by file in the order of their paths; one file in sixteen, chosen by the hash of its
path, is held out whole. A byte-level BPE of 4096 pieces is trained on the rest. `gpt` is a GPT-2 of 4 layers, `llama` a
LLaMA of 4 layers whose 8 query heads share 4 KV groups; both are 256 wide, with 4 million parameters.

A trained model is a Hugging Face folder with its tokenizer, under TILECUT_CACHE/benchmarks, else
~/.cache/tilecut/benchmarks, named by a hash of text, recipe and configuration. Training takes about ten minutes of one
core, keeps a checkpoint and goes on from it when it was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

console = Console()

MODELS = ("gpt", "llama")
END = "<|endoftext|>"
# Tests are often not installed; packages differ from machine to machine.
LEFT_OUT = ("test", "tests", "site-packages", "dist-packages", "__pycache__")
HOLD_OUT_ONE_IN = 16
CHECKPOINT_STEPS = 50

# input_ids [B, S] -> logits [B, S, V]
LanguageModel = Callable[[Tensor], Tensor]
# steps done, steps in all, loss
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but for the text and the processor's rounding."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_groups: int = 4
    neurons: int = 1024
    gated_neurons: int = 704
    length: int = 256
    batch: int = 8
    steps: int = 1300
    warmup: int = 60
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """A linear warm-up, under a cosine to zero."""
        rising, falling = (step + 1) / max(self.warmup, 1), 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.learning_rate * min(rising, falling)


@dataclass(frozen=True)
class Text:
    """Files by path, in order, to train on and held out."""

    train: Mapping[str, str]
    test: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """A hash of every path and byte."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(json.dumps(list(part.items())).encode())
        return digest.hexdigest()


def read_text(root: Path | None = None) -> Text:
    """The .py files under `root` (default: the standard library), whole files held out by the hash of their path."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if not set(LEFT_OUT) & set(name.split("/")):
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HOLD_OUT_ONE_IN == 0
            parts[held_out][name] = path.read_text(encoding="utf-8", errors="replace")
    return Text(*parts)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; nothing is unknown to it, and decoding gives back the bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def windows(texts: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """All texts end to end, each after an end-of-text token, cut into rows of `length` tokens: [N, length]."""
    ids: list[int] = []
    for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.eos_token_id, *row]
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def sample(rows: Tensor, count: int, seed: int = 0) -> Tensor:
    """`count` of the rows, or all, in an order that the seed decides."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


def new_model(name: str, recipe: Recipe) -> Any:
    """An untrained `gpt` or `llama` of the recipe's sizes."""
    torch.manual_seed(recipe.seed)
    common: dict[str, Any] = {
        "vocab_size": recipe.vocabulary,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }
    if name == "gpt":
        return GPT2LMHeadModel(
            GPT2Config(
                **common,
                n_positions=recipe.length,
                n_embd=recipe.width,
                n_layer=recipe.layers,
                n_head=recipe.heads,
                n_inner=recipe.neurons,
                # One pass over the text: nothing to regularise.
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            **common,
            hidden_size=recipe.width,
            intermediate_size=recipe.gated_neurons,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_groups,
            max_position_embeddings=recipe.length,
            tie_word_embeddings=True,
        )
    )


def perplexity(model: LanguageModel, rows: Tensor, batch: int = 8, advance: Callable[[int], object] = int) -> float:
    """exp of the mean cross entropy of every token of `rows` [N, S] but the first of each; `advance` counts rows."""
    total = 0.0
    with torch.inference_mode():
        for part in rows.split(batch):
            logits = model(part)[:, :-1].flatten(0, 1).float()
            total += float(F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum"))
            advance(len(part))
    return math.exp(total / (len(rows) * (rows.shape[1] - 1)))


def unigram_perplexity(train: Tensor, rows: Tensor, vocabulary: int) -> float:
    """What a model that knows only how often each token comes would have: the line that a real model is far below."""
    counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 1
    return float((-(counts / counts.sum()).log()[rows[:, 1:]].mean()).exp())


def cache_folder() -> Path:
    """Where trained models are kept."""
    return Path(os.environ.get("TILECUT_CACHE") or Path.home() / ".cache" / "tilecut") / "benchmarks"


def model_folder(
    name: str,
    recipe: Recipe | None = None,
    text: Text | None = None,
    cache: Path | None = None,
    on_step: OnStep = lambda done, of, loss: None,
) -> Path:
    """The folder of a trained model with its tokenizer; trains it where it is missing."""
    recipe = recipe or Recipe()
    text = text or read_text()
    cache = cache or cache_folder()
    key = hashlib.sha256(json.dumps([name, asdict(recipe), text.fingerprint]).encode()).hexdigest()[:16]
    folder = cache / f"{name}-{key}"
    if folder.is_dir():
        return folder
    tokenizer = train_tokenizer(list(text.train.values()), recipe.vocabulary)
    rows = windows(list(text.train.values()), tokenizer, recipe.length)
    checkpoint = cache / f"{name}-{key}.checkpoint"
    cache.mkdir(parents=True, exist_ok=True)
    model = train(new_model(name, recipe), rows, recipe, checkpoint, on_step)
    scratch = Path(tempfile.mkdtemp(dir=cache))
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    # A folder under the final name is a whole one.
    scratch.rename(folder)
    checkpoint.unlink(missing_ok=True)
    return folder


def train(model: Any, rows: Tensor, recipe: Recipe, checkpoint: Path, on_step: OnStep) -> Any:
    """AdamW with a linear warm-up and a cosine to zero, on rows in a seeded order; goes on from `checkpoint`."""
    # Gains and biases are not decayed.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    start = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    # Half as long where the processor multiplies bfloat16; the weights stay float32.
    fast = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    model.train()
    for step, index in enumerate(_batches(len(rows), recipe)):
        if step < start:
            continue
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        batch = rows[index]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = model(input_ids=batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1, recipe.steps, loss.item())
        if (step + 1) % CHECKPOINT_STEPS == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
    return model.eval()


def _batches(rows: int, recipe: Recipe) -> Iterator[Tensor]:
    """The rows of every step: pass after pass over all of them, each in an order of its own."""
    generator = torch.Generator().manual_seed(recipe.seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.steps):
        while len(left) < recipe.batch:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[: recipe.batch]
        left = left[recipe.batch :]


def train_with_bar(name: str, recipe: Recipe, text: Text) -> Path:
    """`model_folder` under a progress bar that shows the loss."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task(f"train {name}", total=recipe.steps)

        def show(done: int, of: int, loss: float) -> None:
            bars.update(task, completed=done, description=f"train {name}, loss {loss:.2f}")

        folder = model_folder(name, recipe, text, on_step=show)
        bars.update(task, completed=recipe.steps)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="train a model, or find it trained")
    training.add_argument("--model", choices=MODELS, required=True)
    options = parser.parse_args()
    console.print(train_with_bar(options.model, Recipe(), read_text()))


if __name__ == "__main__":
    main()
