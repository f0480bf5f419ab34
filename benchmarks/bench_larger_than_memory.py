"""Prune a checkpoint that is larger than the memory it is given: a random LLaMA-like model (GQA), half of it cut, refitted.

The checkpoint is written shard by shard into a scratch folder; then a child process in a control group with a memory
limit (page cache counts too) treats it. Where no such group can be made, which takes root or a delegated one, nothing is
limited and the output says so. Printed are seconds and, per stage, the peak of anonymous memory: what the kernel cannot
drop. The model has random weights, so nothing is said about its quality.

Run: python benchmarks/bench_larger_than_memory.py [--gigabytes 4] [--cap 2] [--whole [--target edge] [--no-refit]]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tilecut import PruneConfig, compile_pruned
from tilecut.choose_plan import choose_plan
from tilecut.load_model import load_model
from tilecut.progress import Progress
from tilecut.write_weights import write_weights
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.calibration import check_batches
from tilecut_passes.capture import capture
from tilecut_passes.disk_tensor import DiskTensors
from tilecut_passes.prune import Prune
from tilecut_passes.reconstruct import Reconstruct
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import score
from tilecut_runtime.torch_program import WEIGHTS
from tilecut_targets.find_target import find_target

ROWS, LENGTH = 4, 128
# The widths of a 1.1 billion parameter LLaMA (https://arxiv.org/abs/2401.02385); as many layers as the size asks for.
WIDTHS = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
# Of checkpoints under a gigabyte, which tests make.
SMALL_WIDTHS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
}
# Folder of a control group's own, its limit, and the most that it ever held: cgroup v1 and v2.
CONTROL = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)


def main() -> None:
    """Make the checkpoint, run the child, print what it measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint in float32")
    parser.add_argument("--cap", type=float, default=2.0, help="gigabytes that the child may have")
    parser.add_argument("--batches", type=int, default=4, help=f"calibration batches of {ROWS} x {LENGTH} tokens")
    parser.add_argument("--whole", action="store_true", help="compile_pruned, instead of its stages up to the weights")
    parser.add_argument("--target", default="cuda", help="of --whole")
    parser.add_argument("--no-refit", action="store_true", help="with --whole: leave the layers as they were cut")
    parser.add_argument("--scratch", type=Path, help="folder on a disk; default: the system's for temporary files")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, output = options.child
        if options.whole:
            measured = compile_whole(folder, output, options.batches, options.target, not options.no_refit)
        else:
            measured = run_stages(folder, output, options.batches)
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        size = make_checkpoint(Path(scratch) / "model", options.gigabytes)
        print(f"checkpoint {size / 1e9:.2f} GB, cap {options.cap:g} GB")
        more = ["--target", options.target, *(["--no-refit"] if options.no_refit else [])]
        whole = ["--whole", *more] if options.whole else []
        measured = run_child(Path(scratch), options.batches, whole, int(options.cap * 1e9))
    print(f"limited by {measured['limited']}, {measured['seconds']:.0f} s in all")
    if measured["group_peak"] is not None:
        print(f"most memory of the group, page cache included: {measured['group_peak'] / 1e9:.2f} GB")
    for stage, seconds, anonymous in measured["stages"]:
        print(f"{stage:18} {seconds:7.1f} s   peak anonymous memory {anonymous / 1e9:.2f} GB")
    print(f"{measured['layers']} layers refitted, {measured['bytes'] / 1e9:.2f} GB of weights written")


def make_checkpoint(folder: Path, gigabytes: float, seed: int = 0) -> int:
    """Write a random LLaMA of about that size, a shard a layer; returns its bytes."""
    folder.mkdir(parents=True)
    sizes = WIDTHS if gigabytes > 1 else SMALL_WIDTHS
    config = transformers.LlamaConfig.from_dict({**sizes, "num_hidden_layers": 1, "max_position_embeddings": 512})
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    layer = {k: v for k, v in shapes.items() if ".layers.0." in k}
    rest = {k: v for k, v in shapes.items() if k not in layer}
    in_layer, in_rest = (sum(shape.numel() for shape in part.values()) for part in (layer, rest))
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 / 4 - in_rest) / in_layer))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    names: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for i in range(-1, config.num_hidden_layers):
        part = rest if i < 0 else {k.replace(".layers.0.", f".layers.{i}."): v for k, v in layer.items()}
        # Norms of one and weights that keep the variance: activations of the size that trained models have.
        tensors = {
            k: torch.ones(v) if len(v) == 1 else torch.randn(v, generator=generator) * v[-1] ** -0.5
            for k, v in part.items()
        }
        file = f"model-{i + 1:05}.safetensors"
        write_weights(tensors, folder / file, {"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def run_child(scratch: Path, batches: int, whole: list[str], cap: int | None) -> dict[str, Any]:
    """Run a child on `scratch/model` within `cap` bytes (None: no limit); what it measured."""
    command = [sys.executable, __file__, "--child", str(scratch / "model"), str(scratch / "out")]
    command += ["--batches", str(batches), *whole]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    with control_group(cap) as group:

        def join() -> None:
            if group is not None:
                (group[0] / "cgroup.procs").write_text(str(os.getpid()))

        start = time.perf_counter()
        done = subprocess.run(command, env=environment, preexec_fn=join, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the child ended with {done.returncode}:\n{done.stderr[-2000:]}")
        measured = json.loads(done.stdout.splitlines()[-1])
        measured["seconds"] = time.perf_counter() - start
        measured["limited"] = "a control group" if group is not None else "nothing"
        measured["group_peak"] = int(group[1].read_text()) if group is not None else None
    return measured


@contextmanager
def control_group(cap: int | None) -> Iterator[tuple[Path, Path] | None]:
    """A control group of at most `cap` bytes and the file of its peak; None where there is no cap or none can be made."""
    for root, limit, peak in CONTROL if cap is not None else ():
        group = root / f"tilecut-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            try:
                (group / limit).write_text(str(cap))
            except OSError:
                continue
            yield group, group / peak
            return
        finally:
            group.rmdir()
    yield None


@dataclass
class Stages(Progress):
    """Progress that samples the peak of anonymous memory of each stage."""

    peaks: dict[str, int] = field(default_factory=dict)
    current: str = "import"

    def __post_init__(self) -> None:
        self.on_stage = self._begin
        threading.Thread(target=self._sample, daemon=True).start()

    def _begin(self, title: str) -> None:
        self.current = title

    def _sample(self) -> None:
        while True:
            title = self.current
            self.peaks[title] = max(self.peaks.get(title, 0), anonymous_bytes())
            time.sleep(0.01)

    def lines(self) -> list[tuple[str, float, int]]:
        """Title, seconds and peak of every stage."""
        return [(title, self.seconds.get(title, 0.0), peak) for title, peak in self.peaks.items()]


def anonymous_bytes() -> int:
    """What this process holds that is in no file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def made_up_batches(folder: Path, count: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = transformers.AutoConfig.from_pretrained(str(folder)).vocab_size
    ids = [torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def run_stages(folder: Path, output: Path, batches: int) -> dict[str, Any]:
    """The stages of a compile up to the written weights, one after another."""
    stages = Stages()
    output.mkdir()
    disk = DiskTensors(output / "offload")
    config = PruneConfig(sparsity=0.5, method="magnitude", at={"sequence": LENGTH})
    with stages.stage("load"):
        model = load_model(folder, disk.folder)
    with stages.stage("capture"):
        dense = capture(model)
        fit = check_batches(dense, made_up_batches(folder, batches))
    with stages.stage("axes"):
        axes = infer(dense)
        groups = [g for g in find_groups(axes) if g.kind in config.kinds]
    with stages.stage("score"):
        rankings = score("magnitude", dense, groups, [])
    with stages.stage("search"):
        plan = choose_plan(dense, axes, groups, rankings, config, find_target("cuda")).plan
    with stages.stage("prune"):
        pruned = dense.copy()
        pruned.store = disk
        run_passes(pruned, [Prune(plan)])
    with stages.stage("reconstruct"):
        layers = run_passes(pruned, [Reconstruct(dense, fit, plan, offload=disk.folder)])[0].rewrites
    with stages.stage("write"):
        write_weights(pruned.tensors, output / WEIGHTS, {"format": "pt"})
    return {"stages": stages.lines(), "layers": layers, "bytes": (output / WEIGHTS).stat().st_size}


def compile_whole(folder: Path, output: Path, batches: int, target: str, refit: bool) -> dict[str, Any]:
    """`compile_pruned` with a folder to offload to."""
    stages = Stages()
    scratch = output.with_name("offload")
    config = PruneConfig(sparsity=0.5, method="magnitude", reconstruct=refit, at={"sequence": LENGTH}, offload=str(scratch))
    artifact = compile_pruned(
        folder,
        target,
        calibration=made_up_batches(folder, batches),
        config=config,
        output=output,
        measure=False,
        progress=stages,
    )
    passes = {p["name"]: p["rewrites"] for p in artifact.report["passes"]}
    return {
        "stages": stages.lines(),
        "layers": passes.get("Reconstruct", 0),
        "bytes": (artifact.path / WEIGHTS).stat().st_size,
    }


if __name__ == "__main__":
    main()
