"""A decoder and a Hugging Face GPT-2 on texts of different lengths: padded, nested and packed, ours beside others'.

    make bench-varlen    or    python benchmarks/varlen.py [--size paper|small] [--steps 100] [--only train,tilecut] ..

On a GPU: 24 layers, width 1024, 16 heads of 64, vocabulary 1024; batches of 32 texts, lengths uniform in 1..1024; bfloat16
autocast over float32 weights, SGD, matmul precision high. Eval is not causal, training is; dropout is off for all. A step
is a batch from the loader (12 processes), masks, forward, loss and, in training, backward and update. Steps 21 to 100 count:
median and mean. Every contender sees the same texts and starts from the same weights; they run one after another.

Before a contender is timed its tokens' losses (GPT-2: its loss) and, in training, all gradients on the first texts are
compared with the padded SDPA model in float32. It is right within three times the error of that model in the
contender's own precision. "pruned" is ours with half of the heads and neurons, compared with a model of that size.

Last come the packed attention ops alone, at the lengths of the first batch. Without a GPU it runs a small model in float32,
compiled without code generation (backend "aot_eager"): it keeps this script alive and says nothing about speed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import attention as ops
import contenders
import tilecut
from attention_peers import Packed
from contenders import OURS, Entry, Goal, LeftOut, Row, attempt, console, need, relative_error, release, wanted
from decoder import Decoder, Layout, Shape, layouts
from tilecut import pack, pad_to_longest
from tilecut.collate import IGNORED
from tilecut_runtime.errors import first_line

PRUNED = f"{OURS}, pruned"
FORMS = ("eager", "compiled")
# Times the error of the padded SDPA model in the same precision.
MARGIN = 3.0
LEAST_TOLERANCE = 1e-5
CHECKED_TEXTS = 4
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """A preset."""

    shape: Shape
    batch: int
    workers: int
    steps: int
    warmup: int
    bfloat16: bool
    backend: str
    compile_gpt2: bool


SIZES = {
    "paper": Size(Shape(24, 1024, 16, 64, 4096, 1024, 1024), 32, 12, 100, 20, True, "inductor", True),
    "small": Size(Shape(1, 32, 4, 8, 64, 64, 48), 4, 0, 3, 2, False, "aot_eager", False),
}


class Texts(Dataset[dict[str, Tensor]]):
    """Random tokens, lengths uniform in 1..longest; text i is the same in every process and for every contender."""

    def __init__(self, count: int, longest: int, vocabulary: int, shifted: bool):
        self.count, self.longest, self.vocabulary, self.shifted = count, longest, vocabulary, shifted

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(1, self.longest + 1, (), generator=generator))
        ids = torch.randint(self.vocabulary, (length + 1,), generator=generator)
        # transformers shifts labels itself.
        return {"input_ids": ids[:-1], "labels": ids[1:] if self.shifted else ids[:-1].clone()}


@dataclass(frozen=True)
class Contender:
    """A model and its batches.

    `make` gives the model, compiled or not; `losses` takes a model, a batch and whether it is to be compared, and gives the
    mean loss, or, to compare, that of every labelled token in order where the model tells.
    """

    collate: Callable[..., Any]
    make: Callable[[bool], nn.Module]
    losses: Callable[[nn.Module, Any, bool], Tensor]


@dataclass
class Protocol:
    """How contenders are checked and timed."""

    size: Size
    device: torch.device
    backend: str

    def autocast(self, on: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on and self.size.bfloat16)

    def step(
        self, contender: Contender, model: nn.Module, batch: Any, train: bool, low: bool = True, compared: bool = False
    ) -> Tensor:
        """The losses of a batch, with gradients where the model trains."""
        with torch.set_grad_enabled(train), self.autocast(low):
            losses = contender.losses(model, batch, compared)
            mean = losses.mean()
        if train:
            mean.backward()
        return losses

    def result(self, contender: Contender, model: nn.Module, texts: Texts, train: bool, low: bool = True) -> Result:
        """Losses and gradients on the first texts."""
        batch = contender.collate([texts[i] for i in range(CHECKED_TEXTS)])
        losses = self.step(contender, model, batch, train, low, compared=True).detach()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return Result(losses, gradients)

    def time(self, contender: Contender, model: nn.Module, texts: Texts, train: bool) -> list[float]:
        """Milliseconds of every step, the loader's and the update's included."""
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
        loader = DataLoader(
            texts,
            self.size.batch,
            collate_fn=contender.collate,
            num_workers=self.size.workers,
            pin_memory=self.device.type == "cuda",
        )
        marks = [self.mark()]
        for batch in loader:
            self.step(contender, model, batch, train)
            if train:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            marks.append(self.mark())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]

    def mark(self) -> Any:
        """A moment in the device's work; nothing waits for it."""
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Result:
    """Losses of tokens, or one; and gradients in the order of the parameters."""

    losses: Tensor
    gradients: list[Tensor]

    def error(self, want: Result) -> float:
        """The larger of the relative errors of losses, less what they have in common, and of all gradients together."""
        if len(self.gradients) != len(want.gradients) or self.losses.shape != want.losses.shape:
            return float("inf")
        middle = want.losses.mean() if want.losses.ndim else 0.0
        errors = [relative_error(self.losses - middle, want.losses - middle)]
        if want.gradients:
            pairs = list(zip(self.gradients, want.gradients))
            distance = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
            errors.append((distance / sum(float(b.float().square().sum()) for _, b in pairs)) ** 0.5)
        return max(errors)


@dataclass(frozen=True)
class Failed:
    """A reference that raised."""

    why: str


class Bench:
    """What has been measured."""

    def __init__(self, size: Size, device: torch.device, backend: str, only: str | None):
        self.size, self.device, self.only = size, device, only
        self.protocol = Protocol(size, device, backend)
        self.rows: list[Row] = []

    def texts(self, shifted: bool) -> Texts:
        shape = self.size.shape
        return Texts(self.size.batch * self.size.steps, shape.positions, shape.vocabulary, shifted)

    def run(self) -> Iterator[None]:
        """Every section; yields after every contender and every case."""
        for train in (False, True):
            dense, pruned = (self.decoders(shape) for shape in (self.size.shape, self.size.shape.halved()))
            panel = "decoder, train" if train else "decoder, eval"
            yield from self.race(panel, dense, self.texts(shifted=True), train, "SDPA, pad to longest")
            held = {PRUNED: pruned[OURS], "SDPA, pad to longest": pruned["SDPA, pad to longest"]}
            yield from self.race(panel, held, self.texts(shifted=True), train, "SDPA, pad to longest", [PRUNED])
            contenders.show(
                panel, [row for row in self.rows if row["case"] == panel], {"mean_ms": ".3f"}, self.best(panel)
            )
        panel = "GPT-2, train"
        yield from self.race(panel, self.gpt2(), self.texts(shifted=False), True, "SDPA, pad to longest")
        contenders.show(panel, [row for row in self.rows if row["case"] == panel], {"mean_ms": ".3f"}, self.best(panel))
        yield from self.ops()

    def race(
        self,
        panel: str,
        held: Mapping[str, Contender],
        texts: Texts,
        train: bool,
        reference: str,
        names: Sequence[str] | None = None,
    ) -> Iterator[None]:
        """Rows of the contenders `names` (None: all), one after another."""
        chosen = [name for name in names or held if wanted(self.only, panel, name)]
        if not chosen:
            return
        try:
            want, tolerance = self.reference(held[reference], texts, train)
        except Exception as e:
            release()
            want, tolerance = Failed(first_line(e)), 0.0
        for name, form in itertools.product(chosen, FORMS):
            console.print(f"{panel}: {name}, {form}")
            row: Row = {"section": panel, "case": panel, "panel": panel, "x": name, "series": form}
            row |= {"name": f"{name}, {form}", "tolerance": tolerance}
            if isinstance(want, Failed):
                row |= {"status": "failed", "why": f"the reference: {want.why}", "error": None}
            else:
                row |= self.measure(held[name], form == "compiled", texts, train, want, tolerance)
            self.rows.append(row)
            yield

    def reference(self, plain: Contender, texts: Texts, train: bool) -> tuple[Result, float]:
        """The result in float32, and how far one that is right may be from it."""
        model = plain.make(False).train(train)
        torch.set_float32_matmul_precision("highest")
        try:
            want = self.protocol.result(plain, model, texts, train, low=False)
        finally:
            torch.set_float32_matmul_precision("high")
        usual = self.protocol.result(plain, model, texts, train).error(want)
        return want, max(MARGIN * usual, LEAST_TOLERANCE)

    def measure(self, one: Contender, compiled: bool, texts: Texts, train: bool, want: Result, tolerance: float) -> Row:
        """One contender, compared and timed."""
        torch._dynamo.reset()

        def ready() -> Entry:
            model = one.make(compiled).train(train)
            if compiled:
                model.compile(backend=self.protocol.backend)
            error = self.protocol.result(one, model, texts, train).error(want)
            # What was compiled for a few texts is not what runs on many.
            torch._dynamo.reset()
            return Entry(lambda: self.protocol.time(one, model, texts, train), error)

        row = attempt(ready, tolerance)
        run = row.pop("run")
        if row["status"] == "ok":
            try:
                steps = run()[self.size.warmup :]
                row |= {"ms": statistics.median(steps), "mean_ms": statistics.fmean(steps), "steps_ms": steps}
                row["height"] = row["ms"]
            except Exception as e:
                row |= {"status": "failed", "why": f"while timed: {first_line(e)}"}
        del run
        release()
        return row

    def decoders(self, shape: Shape) -> dict[str, Contender]:
        """The hand-written model in every layout; where it is causal, it trains."""

        def make(layout: Layout, compiled: bool) -> nn.Module:
            attend = layout.attend(compiled, self.device)
            torch.manual_seed(0)
            with torch.device(self.device):
                return Decoder(shape, attend)

        def losses(layout: Layout, model: nn.Module, batch: Any, compared: bool) -> Tensor:
            inputs = layout.prepare(batch, torch.is_grad_enabled(), self.device)
            found, labelled = model(*inputs), inputs.labels.flatten() != IGNORED
            # The others are 0; choosing would wait for the device.
            return found[labelled] if compared else found.sum() / labelled.sum()

        return {
            name: Contender(layout.collate, functools.partial(make, layout), functools.partial(losses, layout))
            for name, layout in layouts(shape.positions).items()
        }

    def gpt2(self) -> dict[str, Contender]:
        """Hugging Face's model, as its users batch it."""
        shape = self.size.shape
        tilecut.register_attention()
        padded, packed = functools.partial(pad_to_longest, multiple_of=8), pack

        def make(implementation: str, compiled: bool) -> nn.Module:
            if implementation == "flash_attention_2":
                need("flash_attn")
            if compiled and not self.size.compile_gpt2:
                raise LeftOut("compiling it takes longer than all else of this size")
            config = transformers.GPT2Config(
                vocab_size=shape.vocabulary,
                n_positions=shape.positions,
                n_embd=shape.width,
                n_layer=shape.layers,
                n_head=shape.heads,
                **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
                **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
            )
            torch.manual_seed(0)
            return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(
                self.device
            )

        def losses(model: nn.Module, batch: Any, compared: bool) -> Tensor:
            moved = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
            return model(**{"use_cache": False} | moved).loss

        held = {
            "SDPA, pad to longest": (padded, "sdpa"),
            "SDPA, packed": (packed, "sdpa"),
            "flash_attention_2, pad to longest": (padded, "flash_attention_2"),
            "flash_attention_2, packed": (packed, "flash_attention_2"),
            OURS: (packed, OURS),
        }
        return {
            name: Contender(collate, functools.partial(make, implementation), losses)
            for name, (collate, implementation) in held.items()
        }

    def ops(self) -> Iterator[None]:
        """The attention of one layer alone."""
        shape = self.size.shape
        texts = self.texts(shifted=True)
        lengths = tuple(len(texts[i]["input_ids"]) for i in range(self.size.batch))
        preset = ops.SIZES["paper" if self.device.type == "cuda" else "small"]
        bench = ops.Bench(preset, self.device, self.only)
        for causal in (False, True):
            p = Packed(lengths, shape.heads, shape.head_width, causal, bench.dtype, self.device)
            for rows in bench.packed_case(
                f"packed op, {'causal' if causal else 'not causal'}", f"{shape.heads} heads", p
            ):
                # The picture's other panels are in milliseconds.
                self.rows += [{**row, "height": row.get("ms")} for row in rows]
                yield

    def best(self, panel: str, mine: str = OURS) -> str:
        """The name of the faster form of ours."""
        times = {form: self.ms(panel, f"{mine}, {form}") for form in FORMS}
        form = min(FORMS, key=lambda form: times[form] or float("inf"))
        return f"{mine}, {form}"

    def ms(self, panel: str, name: str) -> float | None:
        """The mean of the counted steps, as the table that is rebuilt has it."""
        return next((row.get("mean_ms") for row in self.rows if (row["case"], row["name"]) == (panel, name)), None)

    def goals(self) -> list[Goal]:
        """What is wanted of an H100, beside what was measured."""
        # Elsewhere no time means anything.
        there = self.device.type == "cuda"
        took = {
            (panel, mine): [ms] if there and (ms := self.ms(panel, self.best(panel, mine))) else []
            for panel in ("decoder, eval", "decoder, train", "GPT-2, train")
            for mine in (OURS, PRUNED)
        }
        ratios = [
            took[panel, OURS][0] / took[panel, PRUNED][0]
            for panel in ("decoder, eval", "decoder, train")
            if took[panel, OURS] and took[panel, PRUNED]
        ]
        alone = [row for row in self.rows if row["section"].startswith("packed op")] if there else []
        return [
            Goal("decoder, eval, ours", 42, took["decoder, eval", OURS], at_most=True, unit="ms"),
            Goal("decoder, train, ours", 159, took["decoder, train", OURS], at_most=True, unit="ms"),
            Goal("GPT-2, train, ours", 323, took["GPT-2, train", OURS], at_most=True, unit="ms"),
            Goal("half of the heads and neurons, beside all of them", 1.7, ratios),
            Goal("packed op, beside varlen_attn", 1.0, contenders.times_peer(alone, "varlen_attn")),
        ]


def parse() -> argparse.Namespace:
    parser = contenders.arguments(__doc__, "varlen")
    parser.add_argument("--steps", type=int, help="steps of each contender, those of --warmup included")
    parser.add_argument("--warmup", type=int, help="steps that do not count")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int, help="of the model; the heads keep theirs")
    parser.add_argument("--backend", help="of torch.compile")
    return parser.parse_args()


def chosen_size(options: argparse.Namespace, name: str) -> Size:
    """The preset with what the options change."""
    size = SIZES[name]
    shape = size.shape
    if options.layers:
        shape = replace(shape, layers=options.layers)
    if options.width:
        heads = options.width // shape.head_width
        shape = replace(shape, width=options.width, heads=heads, neurons=4 * options.width)
    return replace(
        size,
        shape=shape,
        steps=options.steps or size.steps,
        warmup=size.warmup if options.warmup is None else options.warmup,
    )


def main() -> None:
    options = parse()
    transformers.utils.logging.set_verbosity_error()
    device, name, output = contenders.chosen(options, "varlen")
    size = chosen_size(options, name)
    if not 0 <= size.warmup < size.steps:
        raise SystemExit(f"--warmup: got {size.warmup}, wanted fewer than the {size.steps} steps")
    ops.prepare_torch()
    bench = Bench(size, device, options.backend or size.backend, options.only)
    clock = "CUDA events between steps" if device.type == "cuda" else "CPU time of the process"
    header = {"size": name, "shape": vars(size.shape), "batch": size.batch, "steps": size.steps, "warmup": size.warmup}
    header |= {"backend": bench.protocol.backend, "clock": clock, **contenders.environment(device)}
    console.print(f"{header['gpu'] or 'no GPU'}; {clock}, medians of steps {size.warmup + 1} to {size.steps}")
    for _ in bench.run():
        contenders.write(output, header, bench.rows, bench.goals())
    contenders.finish(output, bench.rows, bench.goals(), "ms")


if __name__ == "__main__":
    main()
