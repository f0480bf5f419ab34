"""How long axis inference takes, as a function of the size of the graph: LLaMA-7B's shapes, weights on the meta device.

Run: python benchmarks/bench_axis_inference.py
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import tracemalloc
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture

LAYERS, ROUNDS = (4, 8, 16, 32), 5
SHAPES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 11008,
}


def main() -> None:
    """Print a line for every depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    depths = parser.parse_args().layers
    table = Table(
        "layers",
        "nodes",
        "groups",
        "capture s",
        "infer s",
        "groups s",
        "ms a node",
        "Python MB",
        title=platform.machine(),
    )
    for depth in depths:
        table.add_row(*measure(depth))
    Console().print(table)


def measure(layers: int) -> list[str]:
    """One line: medians of `ROUNDS` runs, CPU seconds of this process."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES, num_hidden_layers=layers))
    start = time.process_time()
    graph = capture(model)
    captured = time.process_time() - start
    nodes = len(list(graph.nodes))
    inferring, grouping, groups = [], [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        axes = infer(graph)
        inferring.append(time.process_time() - start)
        start = time.process_time()
        groups = find_groups(axes)
        grouping.append(time.process_time() - start)
    tracemalloc.start()
    axes = infer(graph)
    find_groups(axes)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    held = dict(model.named_parameters())
    assert all(graph.tensor(name) is held[name] for name in graph.tensors if name in held), "a weight was copied"
    infer_s, groups_s = statistics.median(inferring), statistics.median(grouping)
    return [
        str(layers),
        str(nodes),
        str(len(groups)),
        f"{captured:.1f}",
        f"{infer_s:.2f}",
        f"{groups_s:.2f}",
        f"{1e3 * infer_s / nodes:.3f}",
        f"{peak:.1f}",
    ]


if __name__ == "__main__":
    main()
