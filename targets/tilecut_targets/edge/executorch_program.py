"""target="edge:executorch": a program for ExecuTorch, `model.pte`, whose products run in XNNPACK.

Attention is MatMul and Softmax, which XNNPACK takes; it does not take ExecuTorch's SDPA. ExecuTorch plans its memory
before it runs: every dynamic size has an upper bound, the model's own where it is small enough, and memory for the largest
sizes is taken when the program is loaded.

With int8 the linear layers are quantized by XNNPACK's own quantizer: weights int8 a column, activations rounded in the run,
a range a row. Here that comes before lowering, since a program cannot be rewritten.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import json
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_runtime.errors import ArtifactError, LoweringError, first_line
from tilecut_runtime.executorch_runner import open_executorch
from tilecut_runtime.manifest import DimRange, Rung
from tilecut_runtime.reference import Arrays
from tilecut_targets.decompositions import DECOMPOSITIONS
from tilecut_targets.edge.measure_layers import sizes_at
from tilecut_targets.edge.quantize_onnx import QUANTIZATIONS
from tilecut_targets.edge.runtime_target import RuntimeTarget
from tilecut_targets.edge.write_out_gelu import WriteOutGelu
from tilecut_targets.export_program import example_inputs, export_program
from tilecut_targets.unpack_attention import UnpackAttention

PROGRAM = "model.pte"
# What `emit` tells `quantize_files`, which removes it.
QUANTIZED = "quantized.json"
RESTORED = "quantized_decomposed.dequantize_per_channel"
# Upper bounds where the model has none or a larger one; the caller's example inputs and `at` raise them.
MOST_ROWS, LONGEST = 8, 512
# Before the names of ops that XNNPACK runs.
XNNPACK = "xnnpack "


@dataclass(frozen=True)
class ExecuTorchTarget(RuntimeTarget):
    """ExecuTorch with XNNPACK."""

    chip: str | None = "executorch"
    word: ClassVar[str] = "executorch"
    runtime = "executorch"
    quantizations: ClassVar[Mapping[str, float]] = {"int8": QUANTIZATIONS["int8"]}
    why: ClassVar[Mapping[str, str]] = {
        "attention": "products and softmax in XNNPACK: faster than ExecuTorch's SDPA, which XNNPACK does not take",
        "norms": "ExecuTorch's own kernels: XNNPACK has no layer norm; RMS norms are simpler ops, which XNNPACK takes",
        "rotary": "in simpler ops: neither has an op for it",
        "activations": "in XNNPACK where it has them; the tanh form of gelu in simpler ops, since XNNPACK takes it for the exact",
    }

    @property
    def version(self) -> str:
        """ExecuTorch's."""
        return f"executorch {importlib.metadata.version('executorch')}"

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """What XNNPACK would compute otherwise than meant."""
        return (UnpackAttention(), WriteOutGelu())

    def ranges(self, graph: Graph, at: Mapping[str, int]) -> dict[str, DimRange]:
        """Every size with an upper bound."""
        rows = graph.row_sizes()
        wanted = sizes_at(graph, {**at, **graph.example_sizes})
        bounded = {}
        for name, limits in graph.ranges.items():
            most = max(wanted[name], limits.min, MOST_ROWS if name in rows else LONGEST)
            bounded[name] = DimRange(limits.min, most if limits.max is None else min(most, limits.max))
        return bounded

    def emit(self, lowered: Graph, folder: Path) -> tuple[dict[str, str], dict[str, int]]:
        """The program.

        Raises:
            LoweringError: ExecuTorch has no kernel for an op.
        """
        counts = write_program(lowered, folder / PROGRAM)
        if self.quantize is not None:
            before = (folder / PROGRAM).stat().st_size
            made = quantize_layers(lowered)
            counts = write_program(made, folder / PROGRAM)
            kept = [
                {"what": name, "shape": list(tensor.shape), "why": "no linear layer"}
                for name, tensor in made.tensors.items()
                if tensor.ndim > 1 and tensor.is_floating_point()
            ]
            quantized = {"products": counts.get(f"{XNNPACK}{RESTORED}", 0), "kept": kept, "before": before}
            (folder / QUANTIZED).write_text(json.dumps(quantized), encoding="utf-8")
        return {"model": PROGRAM}, counts

    def quantize_files(self, folder: Path, batches: Sequence[Batch]) -> dict[str, object]:
        """Nothing more than the record: `emit` has quantized."""
        quantized = json.loads((folder / QUANTIZED).read_text(encoding="utf-8"))
        (folder / QUANTIZED).unlink()
        sizes = {"before": quantized.pop("before"), "after": (folder / PROGRAM).stat().st_size}
        return {"quantization": {"how": self.quantize, **quantized, "bytes": sizes}}

    def open_model(self, path: Path, threads: int) -> Callable[[Arrays], object]:
        """The program's method; arrays are taken in their order."""
        made: dict[tuple[str, ...], Callable[[Arrays], object]] = {}

        def run(arrays: Arrays) -> object:
            names = tuple(arrays)
            if names not in made:
                made[names] = open_executorch(path, names, threads)
            return made[names](arrays)

        return run

    def check(self, folder: Path) -> Rung:
        """ExecuTorch loads the program."""
        try:
            open_executorch(folder / PROGRAM, [], None)
        except Exception as e:
            raise ArtifactError(str(folder / PROGRAM), f"no program ({first_line(e)})", fix="compile it again") from e
        return Rung("executorch program", "passed", f"{PROGRAM} is loaded by its runtime")


def write_program(lowered: Graph, path: Path) -> dict[str, int]:
    """A lowered graph as ExecuTorch's program; returns how many calls of each op it makes.

    Raises:
        LoweringError: ExecuTorch has no kernel for an op.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = export_program(lowered, positional=True)
    with _quiet():
        # Its verifiers raise classes of their own.
        try:
            program = program.run_decompositions(dict(DECOMPOSITIONS))
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            # Planning memory changes the graph.
            counts = count_kernels(edge.exported_program().graph_module)
            made = edge.to_executorch()
        except Exception as e:
            raise LoweringError("edge:executorch", f"executorch refused the model: {first_line(e)}") from e
    path.write_bytes(made.buffer)
    return counts


def quantize_layers(lowered: Graph) -> Graph:
    """A graph whose linear layers have int8 weights, and round their inputs in the run.

    Raises:
        LoweringError: torchao, which comes with ExecuTorch, refuses the graph.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    made = lowered.copy()
    program = export_program(made, positional=True)
    with _quiet():
        try:
            config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
            module = program.run_decompositions(dict(DECOMPOSITIONS)).module()
            observed = prepare_pt2e(module, XNNPACKQuantizer().set_global(config))
            # The weights' observers see them in a run; what it is given does not matter.
            observed(*example_inputs(made).values())
            made.module = convert_pt2e(observed)
        except Exception as e:
            raise LoweringError("edge:executorch", f"torchao cannot quantize the model: {first_line(e)}") from e
    return made


def count_kernels(module: fx.GraphModule) -> dict[str, int]:
    """How many calls of each op the program makes; what XNNPACK runs is counted inside its delegates."""
    counts: collections.Counter[str] = collections.Counter()
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        name = getattr(node.target, "__name__", str(node.target))
        if name == "executorch_call_delegate":
            lowered: Any = getattr(module, node.args[0].target)
            inside = lowered.original_module.graph_module
            for op, n in count_kernels(inside).items():
                counts[f"{XNNPACK}{op}"] += n
        else:
            counts[name.removeprefix("aten.").rpartition(".")[0] or name] += 1
    return dict(counts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ExecuTorch logs and warns about what it leaves to its own kernels."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
