"""The edge target beside its peers: MiniLM (real weights) and an encoder of BERT-base's size (random ones).

    make bench-edge        or        python benchmarks/bench_edge.py [--rounds 40] [--threads 1,2] [--only minilm|base]

Each model in one run, everything interleaved round by round: an artifact of half its MACs, that in int8 (of MiniLM, for
onnxruntime and for OpenVINO), the dense model by our own path for onnxruntime and for OpenVINO, torch eager, torch.compile,
torch's export, onnxruntime's and ONNX Script's optimizers on it, OpenVINO and ExecuTorch on torch's export. Batch 1, 128
tokens, medians; one thread counts CPU time, more count wall time. Prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from demo import console, counted, minilm_folder
from sections import SECTIONS, embed, read_sections
from tilecut import PruneConfig, compile_pruned, load, show
from tilecut.bench_artifacts import bench_artifacts

RIVALS = ("dense, torch's export", "dense, ORT's optimizer", "dense, ONNX Script's optimizer")
OURS, OURS_OPENVINO = "dense, same path (edge)", "dense, same path (edge:openvino)"
EAGER, OPENVINO = "dense, torch eager", "dense, OpenVINO"
TEXTS = 500


def half(model: Path, target: str, folder: Path, calibration: Path | None, **more: Any) -> Path:
    """An artifact of half of the model's prunable MACs; without calibration by magnitude, which times alone need."""
    method = {} if calibration is not None else {"method": "magnitude", "reconstruct": False}
    with show.compile_progress(console, quiet=False) as progress:
        config = PruneConfig(sparsity=0.5, **method, **more)
        return compile_pruned(model, target, None, calibration, config, folder, measure=False, progress=progress).path


def cosine(one: Path, other: Path, model: Path) -> float:
    """Mean cosine of two artifacts' mean-pooled embeddings of real texts."""
    texts = read_sections()["test"][0][:TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    vectors = []
    for folder in (one, other):
        session = load(folder)
        encode = lambda inputs, session=session: session.run(inputs)["last_hidden_state"]
        with counted(f"embed {len(texts)} texts", len(texts)) as advance:
            vectors.append(embed(encode, tokenizer, texts, advance))
    return float((vectors[0] * vectors[1]).sum(1).mean())


def bench(model: Path, folders: list[Path], threads: list[int], rounds: int) -> list[str]:
    """Everything of one model: a table, and the ratios that matter."""
    with show.compile_progress(console, quiet=False) as progress:
        found = bench_artifacts(
            folders, threads=threads, rounds=rounds, dense=model, peers=("all",), memory=False, progress=progress
        )
    size = {c["name"]: c["bytes"] for c in found["contenders"]}
    short = lambda name: Path(name).name if Path(name).is_absolute() else name
    lines = ["| threads | contender | ms | of torch eager | largest error | MB |", "|" + "---|" * 6]
    ms: dict[tuple[int, str], float | None] = {}
    for row in found["timings"]:
        ms[row["threads"], row["contender"]] = row["cpu_ms" if row["threads"] == 1 else "wall_ms"]
    for row in found["timings"]:
        mine, eager = ms[row["threads"], row["contender"]], ms[row["threads"], EAGER]
        shown = "differs | " if mine is None or eager is None else f"{mine:.2f} | {mine / eager:.3f}"
        megabytes = size[row["contender"]] / 1e6
        lines.append(f"| {row['threads']} | {short(row['contender'])} | {shown} | {row['error']:.1e} | {megabytes:.1f} |")
    lines += [f"not run: {one['contender']}: {one['why']}" for one in found["not_run"]]
    for count in threads:
        at = {name: value for (n, name), value in ms.items() if n == count and value is not None}
        rival = min((name for name in RIVALS if name in at), key=at.__getitem__)
        lines += [
            "",
            f"{count} thread(s): our dense file is {at[rival] / at[OURS]:.3f} times as fast as the best rival ({rival}), and "
            f"takes {at[OURS] / at[OPENVINO]:.3f} of OpenVINO's time on torch's export; our OpenVINO model takes "
            f"{at[OURS_OPENVINO] / at[OPENVINO]:.3f} of that.",
            *(f"{short(str(f))}: {at[str(f)] / at[OURS]:.3f} of our dense file, {at[str(f)] / at[EAGER]:.3f} of torch eager."
              for f in folders if str(f) in at),
        ]  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", choices=("minilm", "base"))
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    threads = [int(n) for n in options.threads.split(",")]
    lines = []
    with tempfile.TemporaryDirectory() as held:
        scratch = Path(held)
        if options.only != "base":
            model = minilm_folder()
            folders = [
                half(model, "edge", scratch / "half", SECTIONS),
                half(model, "edge", scratch / "half, int8", SECTIONS, quantize="int8"),
                half(model, "edge:openvino", scratch / "half, OpenVINO", None),
                half(model, "edge:openvino", scratch / "half, OpenVINO int8-static", SECTIONS, quantize="int8-static"),
            ]
            lines += ["", "all-MiniLM-L6-v2", "", *bench(model, folders, threads, options.rounds)]
            for few in (folders[1], folders[3]):
                lines.append(f"cosine of {few.name} to half on {TEXTS} texts: {cosine(folders[0], few, model):.4f}")
        if options.only != "minilm":
            model = scratch / "base"
            transformers.BertModel(transformers.BertConfig()).save_pretrained(model)
            folders = [
                half(model, "edge", scratch / "base, half", None),
                half(model, "edge:openvino", scratch / "base, half, OpenVINO", None),
            ]
            lines += ["", "BERT-base's size", "", *bench(model, folders, threads, options.rounds)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
