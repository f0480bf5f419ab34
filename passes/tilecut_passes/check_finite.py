"""Name what holds NaN or infinity: a tensor of the model, or the first call that makes it of finite values.

Masks and the like hold -inf on purpose, so of the tensors only weights (what trains) must be finite; of buffers, and of
what calls make, only NaN is a fault. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import CalibrationError

FIX = "look for NaN or infinity in the model's weights or the calibration data"
# Elements that are looked at together: a tensor on disk need not fit into memory.
CHUNK = 2**24


def check_weights(graph: Graph, where: str = "score") -> None:
    """Refuse a model whose tensors hold NaN, or whose weights hold infinity.

    Raises:
        CalibrationError: names the tensor.
    """
    for name, tensor in graph.tensors.items():
        if not tensor.is_floating_point():
            continue
        is_weight = isinstance(tensor, torch.nn.Parameter)
        parts = tensor.detach().reshape(-1).split(CHUNK)
        if count := sum(int((~part.isfinite() if is_weight else part.isnan()).sum()) for part in parts):
            raise CalibrationError(
                where,
                f"the values of {name} are not finite",
                got=f"{count} of {tensor.numel()} NaN or infinite",
                fix="repair the checkpoint",
            )


def check_finite(graph: Graph, batches: Sequence[Batch], where: str = "calibration") -> None:
    """Refuse a model whose tensors are not finite, or that makes NaN of the first batch: before any long work begins.

    Raises:
        CalibrationError: names the tensor, or the first layer whose result holds NaN.
    """
    check_weights(graph, where)
    if not batches:
        return
    batch = batches[0]
    for name, value in graph.run(batch.inputs).items():
        # A padded position may see nothing at all, and then hold anything.
        if value.is_floating_point() and value.ndim and batch.rows(value).isnan().any():
            raise CalibrationError(
                where,
                f"activations at {first_fault(graph, batch.inputs)} are not finite",
                got=f"NaN in {name}",
                fix=FIX,
            )


def check_values(graph: Graph, inputs: Mapping[str, Tensor], seen: Mapping[str, Tensor], where: str = "score") -> None:
    """Refuse statistics, by the name of what they are of, that are not finite.

    Raises:
        CalibrationError: names the first call of the graph that makes NaN of these inputs, or else the statistic.
    """
    faulty = next((name for name, value in seen.items() if not value.isfinite().all()), None)
    if faulty is None:
        return
    node = first_fault(graph, inputs)
    raise CalibrationError(
        where,
        f"activations at {node} are not finite" if node else f"what was measured at {faulty} is not finite",
        fix=FIX,
    )


def first_fault(graph: Graph, inputs: Mapping[str, Tensor]) -> str | None:
    """The tensor that holds NaN, or the weight that the first call to make NaN reads, else the call; None where none does."""
    with torch.no_grad():
        return _Search(graph).find(*(inputs[name] for name in graph.inputs))


class _Search(fx.Interpreter):
    """Runs a graph up to the first NaN."""

    def __init__(self, graph: Graph):
        super().__init__(graph.module)
        self.fault: fx.Node | None = None

    def find(self, *inputs: Tensor) -> str | None:
        try:
            self.run(*inputs)
        except _Found:
            assert self.fault is not None
            read = [self.fault, *self.fault.all_input_nodes]
            weights = [str(x.target) for x in read if x.op == "get_attr"]
            return weights[0] if weights else self.fault.name
        return None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        values = result if isinstance(result, tuple | list) else (result,)
        if any(isinstance(v, Tensor) and v.is_floating_point() and v.isnan().any() for v in values):
            self.fault = n
            raise _Found
        return result


class _Found(Exception):
    """Ends a run."""
