"""all-MiniLM-L6-v2 on the edge target: latency and accuracy of the pruned artifact against the dense model's best forms.

    make bench        or        python benchmarks/bench_minilm_edge.py [--artifact FOLDER] [--rounds 100]

Everything is timed in one run, interleaved, in plain `onnxruntime.InferenceSession`s with default options but for the
thread count: medians of CPU time (and of wall time) over rounds. Prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

from demo import console, counted, minilm_folder, torch_encoder
from sections import SECTIONS, Judge, read_sections
from tilecut import Artifact, PruneConfig, compile_pruned, load, show
from tilecut.describe_machine import machine
from tilecut_passes.capture import capture
from tilecut_runtime.timing import PRUNED, Timing, settle_of, time_interleaved
from tilecut_targets.edge.contend import OPTIMIZED
from tilecut_targets.find_target import find_target


def time_all(artifact: Artifact, model: Any, threads: int, sequence: int, rounds: int) -> dict[str, Timing]:
    """The artifact and every dense form, interleaved, batch 1."""
    torch.set_num_threads(threads)
    ids = torch.randint(1000, 20000, (1, sequence), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    arrays = {k: v.numpy() for k, v in inputs.items()}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        contenders = find_target("edge").contenders(
            capture(model), artifact.path, artifact.manifest, threads, Path(scratch)
        )
        assert contenders is not None and not contenders.failed, contenders
        runs: dict[str, Callable[[], object]] = {
            name: (lambda run=run: run(arrays)) for name, run in contenders.runners.items()
        }
        runs["dense, torch eager"] = lambda: model(**inputs)
        with counted(f"{threads} thread(s), {sequence} tokens", rounds + 10) as advance:

            def one_round(done: int, of: int) -> None:
                advance(1)

            return time_interleaved(runs, rounds, 10, one_round, settle=settle_of(threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="an artifact made before; default: compile one")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--no-accuracy", action="store_true")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    folder = minilm_folder()
    model = transformers.AutoModel.from_pretrained(str(folder)).eval()
    if options.artifact is not None:
        artifact = Artifact(options.artifact)
    else:
        with show.compile_progress(console, quiet=False) as progress:
            artifact = compile_pruned(
                folder,
                calibration=SECTIONS,
                config=PruneConfig(sparsity=options.sparsity),
                output=Path("demo-output"),
                measure=False,
                progress=progress,
            )
    report = artifact.report
    m = machine()
    lines = [
        f"{m['cpu']}, {m['cores']} cores; onnxruntime {onnxruntime.__version__}, torch {torch.__version__}",
        f"lattice: {report['lattice']}; prunable MACs "
        f"{report['macs']['prunable_pruned'] / report['macs']['prunable_dense']:.4f} of dense; kept "
        + " ".join(f"{g['kept']}" for g in report["groups"]),
        "",
    ]
    if not options.no_accuracy:
        texts = {split: len(held) for split, (held, _) in read_sections().items()}
        with counted("judge the dense model", sum(texts.values())) as advance:
            judge = Judge.from_dense(torch_encoder(model), folder, advance)
        session = load(artifact.path)
        encoder = lambda inputs: session.run(inputs)["last_hidden_state"]
        with counted("judge the pruned artifact", texts["test"]) as advance:
            pruned = judge.scores(encoder, advance)
        dense = judge.scores(None, lambda n: None)
        lines += [
            f"accuracy on {texts['test']} test texts: dense {dense['accuracy']:.2%}, pruned {pruned['accuracy']:.2%}; "
            f"mean cosine {pruned['cosine']:.4f}",
            "",
        ]
    lines += [
        "| threads | tokens | form | CPU ms | wall ms | times pruned (CPU) | times pruned (wall) |",
        "|" + "---|" * 7,
    ]
    for threads, sequence in ((1, 128), (2, 128), (1, 32), (1, 256)):
        timings = time_all(artifact, model, threads, sequence, options.rounds)
        own = timings[PRUNED]
        for name, t in timings.items():
            lines.append(
                f"| {threads} | {sequence} | {name} | {t.cpu_ms:.2f} | {t.wall_ms:.2f} | {t.cpu_ms / own.cpu_ms:.2f} "
                f"| {t.wall_ms / own.wall_ms:.2f} |"
            )
        assert OPTIMIZED in timings
    print("\n".join(lines))


if __name__ == "__main__":
    main()
