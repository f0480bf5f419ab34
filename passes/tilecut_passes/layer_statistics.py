"""What calibration says of dense layers: the Gram matrix of the inputs, and the Fisher information of the outputs.

For a layer y = x W^T + b with inputs X (a column of ones appended, for the bias) over all positions, padding left out:

    gram    X^T X [I + 1, I + 1]
    fisher  sum of g g^T [O, O], g the gradient of the loss (`measure_loss`) at y: the second factor of K-FAC
            (Martens and Grosse, arXiv 1503.05671); only where gradients are asked for

Both accumulate in float64 over batches, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilecut_passes.calibration import Batch
from tilecut_passes.dense_layer import DenseLayer, dense_layer
from tilecut_passes.graph import Graph, source
from tilecut_passes.measure_loss import measure_loss
from tilecut_passes.score import Progress
from tilecut_passes.share_batches import batch_generator, own_share, total
from tilecut_runtime.errors import CalibrationError

FIX = "look for NaN or infinity in the weights or the calibration data"


@dataclass
class LayerStatistics:
    """Sums over all calibration positions of one call of a dense layer; `fisher` is None without gradients."""

    layer: DenseLayer
    gram: Tensor
    fisher: Tensor | None
    rows: float = 0.0


def collect_statistics(
    graph: Graph, nodes: Sequence[str], batches: Sequence[Batch], seed: int, gradients: bool, progress: Progress
) -> dict[str, LayerStatistics]:
    """The statistics of the named calls, which are dense layers.

    Raises:
        CalibrationError: an activation or a gradient is not finite; names the layer.
    """
    layers = {n.name: layer for n in graph.nodes if n.name in set(nodes) and (layer := dense_layer(n)) is not None}
    found = {name: _empty(graph, layer, gradients) for name, layer in layers.items()}
    for done, (i, batch) in enumerate(own_share(batches), 1):
        probe = _Probe(graph, layers, gradients)
        with torch.set_grad_enabled(gradients):
            outputs = dict(zip(graph.outputs, probe.run(*(batch.inputs[name] for name in graph.inputs)), strict=True))
            if gradients:
                loss = measure_loss(outputs, batch, batch_generator(seed, i))
                torch.autograd.backward(loss, inputs=[y for _, y in probe.seen.values()])
        for name, (x, y) in probe.seen.items():
            _add(found[name], batch, x, y.grad if gradients else None)
        progress(done, len(own_share(batches)))
    for one in found.values():
        total(one.gram)
        one.rows = float(total(torch.tensor(one.rows, dtype=torch.float64)))
        if one.fisher is not None:
            total(one.fisher)
        if not one.gram.isfinite().all():
            raise CalibrationError(
                "score", f"activations at {one.layer.weight} are too large to be squared: not finite", fix=FIX
            )
    return found


def _empty(graph: Graph, layer: DenseLayer, gradients: bool) -> LayerStatistics:
    out, width = layer.matrix(graph).shape
    gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    return LayerStatistics(layer, gram, torch.zeros(out, out, dtype=torch.float64) if gradients else None)


def _add(one: LayerStatistics, batch: Batch, x: Tensor, gradient: Tensor | None) -> None:
    seen = [x] if gradient is None else [x, gradient]
    if not all(t.isfinite().all() for t in seen):
        raise CalibrationError(
            "score",
            f"activations or gradients at {one.layer.weight} are not finite",
            fix=FIX,
        )
    rows = batch.rows(x).float()
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    one.gram += (rows.T @ rows).double().cpu()
    one.rows += len(rows)
    if one.fisher is not None and gradient is not None:
        g = batch.rows(gradient).float()
        one.fisher += (g.T @ g).double().cpu()


class _Probe(fx.Interpreter):
    """Runs a graph and keeps the inputs and outputs of the layers asked for."""

    def __init__(self, graph: Graph, layers: Mapping[str, DenseLayer], gradients: bool):
        super().__init__(graph.module)
        self.layers, self.gradients = layers, gradients
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> object:
        layer = self.layers.get(n.name)
        read = self.env[source(n, layer.x)] if layer is not None else None
        result = super().run_node(n)
        if read is not None:
            if self.gradients:
                result.retain_grad()
            self.seen[n.name] = (read.detach(), result)
        return result
