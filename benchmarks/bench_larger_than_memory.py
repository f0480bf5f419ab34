"""Prune a checkpoint that is larger than the memory it is given: a random LLaMA-like model (GQA), half of it cut, refitted.

The checkpoint is written shard by shard into a scratch folder, then a child process under a memory cap treats it: a
control group of its own where that can be made (its page cache is counted too), else a limit on private writable memory
(RLIMIT_DATA). Printed are seconds and the peak of anonymous memory, which is what the kernel cannot drop.

Run: python benchmarks/bench_larger_than_memory.py [--gigabytes 4] [--cap 2] [--whole]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
GROUPS = Path("/sys/fs/cgroup/memory")
BATCHES, ROWS, LENGTH = 4, 4, 128
# The widths of a 1.1 billion parameter LLaMA (https://arxiv.org/abs/2401.02385); its layers are counted to the size.
WIDTHS = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
SMALL_WIDTHS = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}


def main() -> None:
    """Make the checkpoint, run the child, print what it measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint in float32")
    parser.add_argument("--cap", type=float, default=2.0, help="gigabytes that the child may have")
    parser.add_argument("--whole", action="store_true", help="the whole compile instead of its stages up to the weights")
    parser.add_argument("--scratch", type=Path, help="folder on a disk; None: the system's for temporary files")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(treat(*options.child, options.whole)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        size = make_checkpoint(Path(scratch) / "model", options.gigabytes)
        print(f"checkpoint {size / 1e9:.2f} GB, cap {options.cap:g} GB")
        for line in run_capped(Path(scratch), int(options.cap * 1e9), options.whole):
            print(line)


def make_checkpoint(folder: Path, gigabytes: float, seed: int = 0) -> int:
    """Write a random LLaMA of about that size, a shard a layer; returns its bytes."""
    import torch
    import transformers

    from tilecut.write_weights import write_weights

    folder.mkdir(parents=True)
    widths = WIDTHS if gigabytes > 1 else SMALL_WIDTHS
    vocabulary = 32000 if gigabytes > 1 else 8000
    config = transformers.LlamaConfig(**widths, vocab_size=vocabulary, num_hidden_layers=1, max_position_embeddings=512)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    layer = {k: v for k, v in shapes.items() if ".layers.0." in k}
    rest = {k: v for k, v in shapes.items() if k not in layer}
    numbers = [sum(shape.numel() for shape in part.values()) for part in (layer, rest)]
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 / 4 - numbers[1]) / numbers[0]))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    names: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for i in range(-1, config.num_hidden_layers):
        part = rest if i < 0 else {k.replace(".layers.0.", f".layers.{i}."): v for k, v in layer.items()}
        file = f"model-{i + 1:05}.safetensors"
        # Norms of one and weights that keep the variance: activations as in a model that trains.
        tensors = {
            k: torch.ones(v) if len(v) == 1 else torch.randn(v, generator=generator) * v[-1] ** -0.5
            for k, v in part.items()
        }
        write_weights(tensors, folder / file, {"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def run_capped(scratch: Path, cap: int, whole: bool) -> Iterator[str]:
    """Run the child within `cap` bytes; what it measured, as lines."""
    command = [sys.executable, __file__, "--child", str(scratch / "model"), str(scratch / "out")]
    command += ["--whole"] if whole else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    with memory_group(cap) as group:

        def limit() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
            else:
                resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))

        started = time.perf_counter()
        done = subprocess.run(
            command, env=environment, preexec_fn=limit, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(f"the child ended with {done.returncode}:\n{done.stderr[-2000:]}")
        measured = json.loads(done.stdout.splitlines()[-1])
        yield f"limited by {'a control group' if group else 'RLIMIT_DATA'}, {time.perf_counter() - started:.0f} s in all"
        if group is not None:
            yield f"most memory of the group, page cache included: {_number(group / 'memory.max_usage_in_bytes') / 1e9:.2f} GB"
    for stage, seconds, anonymous in measured["stages"]:
        yield f"{stage:12} {seconds:7.1f} s   peak anonymous memory {anonymous / 1e9:.2f} GB"
    yield f"{measured['layers']} layers refitted, {measured['bytes'] / 1e9:.2f} GB written"
    yield f"error of the outputs, relative to the dense model: {measured['cut']:.3f} cut, {measured['refitted']:.3f} refitted"


@contextmanager
def memory_group(cap: int) -> Iterator[Path | None]:
    """A control group of at most `cap` bytes (cgroup v1); None where none can be made."""
    group = GROUPS / f"tilecut-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(cap))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def _number(path: Path) -> int:
    return int(path.read_text())


class Stages:
    """Seconds and the peak of anonymous memory of each stage, sampled."""

    def __init__(self) -> None:
        self.done: list[tuple[str, float, int]] = []
        self.peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.01)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block."""
        self.peak, start = anonymous_bytes(), time.perf_counter()
        yield
        self.done.append((name, time.perf_counter() - start, max(self.peak, anonymous_bytes())))


def anonymous_bytes() -> int:
    """What this process holds that is in no file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def treat(folder: Path, output: Path, whole: bool) -> dict:
    """The child: half of the model's prunable MACs go, the rest is refitted and written."""
    stages = Stages()
    with stages.stage("import"):
        import torch

        from tilecut.choose_plan import choose_plan
        from tilecut.config import PruneConfig
        from tilecut.load_model import load_model
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
        from tilecut_targets.find_target import find_target
    output.mkdir()
    offload = output / "offload"
    with stages.stage("load"):
        model = load_model(folder, offload)
    with stages.stage("capture"):
        graph = capture(model)
        del model
    config = PruneConfig(sparsity=0.5, method="magnitude", at={"sequence": LENGTH})
    generator = torch.Generator().manual_seed(1)
    raw = [
        {
            "input_ids": torch.randint(0, 8000, (ROWS, LENGTH), generator=generator),
            "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        }
        for _ in range(BATCHES + 1)
    ]
    *batches, held_out = check_batches(graph, raw)
    with stages.stage("infer"):
        axes = infer(graph)
        groups = [g for g in find_groups(axes) if g.kind in config.kinds]
    with stages.stage("score"):
        rankings = score("magnitude", graph, groups, [])
    with stages.stage("search"):
        choice = choose_plan(graph, axes, groups, rankings, config, find_target("cuda"))
    with stages.stage("prune"):
        pruned = graph.copy()
        pruned.store = DiskTensors(offload)
        run_passes(pruned, [Prune(choice.plan)])

    def error() -> float:
        want, got = (g.run(held_out.inputs)["logits"] for g in (graph, pruned))
        return float((got - want).norm() / want.norm())

    cut = error()
    with stages.stage("reconstruct"):
        layers = run_passes(pruned, [Reconstruct(graph, batches, choice.plan, offload=offload)])[0].rewrites
    with stages.stage("write"):
        write_weights(pruned.tensors, output / "model.safetensors", {"format": "pt"})
    return {
        "stages": stages.done,
        "layers": layers,
        "bytes": (output / "model.safetensors").stat().st_size,
        "cut": cut,
        "refitted": error(),
    }


if __name__ == "__main__":
    main()
