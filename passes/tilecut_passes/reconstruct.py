"""Refit the weights behind every gate in closed form, so that the pruned model follows the dense one's trajectory.

Before: a pruned graph made from `dense` (node names agree). After: every dense layer that lost inputs has the weights
and bias that solve, over the calibration data,

    min_W,b  || X W^T + b - T ||^2 + lambda || W - W0 ||^2,      T = Y_dense - (r_pruned - r_dense)

where X are the inputs that the pruned layer now sees (everything before it already refitted), Y_dense the dense
layer's output, r the residual stream that the branch adds to, and W0 the sliced weights. Layers are solved in graph
order; dense and pruned run side by side, and only what is still needed of a batch's activations is held. Normal
equations accumulate in float64 over batches. Left alone: everything else.

Least-squares refit after structured removal: He et al., Channel Pruning, arXiv 1707.06168; the residual correction
makes later branches repair what earlier ones lost.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from tilecut_passes.calibration import Batch
from tilecut_passes.dense_layer import DenseLayer, dense_layer
from tilecut_passes.graph import Graph, Refusal, execute, is_call, map_nodes, source, value_of
from tilecut_runtime.errors import CalibrationError

aten = torch.ops.aten
# Contractions of weights that are no dense layers.
OTHERS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.convolution.default,
    torch.ops.tilecut.grouped_matmul.default,
)


@dataclass(frozen=True)
class Site:
    """A layer to refit: its node in the pruned graph and the residual that its output is added to, or None."""

    node: str
    layer: DenseLayer
    residual: str | None


@dataclass(frozen=True)
class Reconstruct:
    """Solve every dense layer whose inputs were cut.

    Args:
        dense: the graph that the pruned one was made from.
        batches: calibration batches.
        ridge: lambda, relative to the mean diagonal of X^T X.
    """

    dense: Graph
    batches: Sequence[Batch]
    ridge: float = 1e-2
    progress: Callable[[int, int], None] = field(default=lambda done, of: None, compare=False)

    def __call__(self, graph: Graph) -> int:
        """Refit in place; returns the number of layers solved.

        Raises:
            CalibrationError: an activation is not finite; names the layer.
        """
        sites = find_sites(self.dense, graph)
        graph.refusals += find_refusals(self.dense, graph, sites)
        runs = [(_Stepper(self.dense, b), _Stepper(graph, b)) for b in self.batches]
        with torch.no_grad():
            for i, site in enumerate(sites):
                self._solve(graph, site, runs)
                self.progress(i + 1, len(sites))
        return len(sites)

    def _solve(self, graph: Graph, site: Site, runs: list[tuple[_Stepper, _Stepper]]) -> None:
        weight, bias = site.layer.matrix(graph), site.layer.offset(graph)
        width = weight.shape[1]
        # A last column of ones carries the bias.
        gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        cross = torch.zeros(width + 1, weight.shape[0], dtype=torch.float64)
        for dense, pruned in runs:
            dense.run_to(site.node, inclusive=True)
            pruned.run_to(site.node, inclusive=False)
            target = dense.value(site.node)
            if site.residual is not None:
                moved = pruned.value(site.residual) - dense.value(site.residual)
                target = target - moved.reshape(target.shape)
            seen = pruned.value(source(pruned.node(site.node), site.layer.x).name)
            x, y = pruned.batch.rows(seen).float(), pruned.batch.rows(target).float()
            if not x.isfinite().all() or not y.isfinite().all():
                raise CalibrationError(
                    "reconstruct",
                    f"activations at {site.layer.weight} are not finite",
                    fix="look for NaN or infinity in the weights or the calibration data",
                )
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            # One batch's products in float32, their sum in float64.
            gram += (x.T @ x).double().cpu()
            cross += (x.T @ y).double().cpu()
        start = torch.cat([weight.double(), bias.double()[:, None]], 1).T
        solved = _ridge(gram, cross, start, self.ridge, with_bias=site.layer.bias is not None)
        graph.set_tensor(site.layer.weight, nn.Parameter(site.layer.held(solved[:-1].T.to(weight.dtype))))
        if site.layer.bias is not None:
            graph.set_tensor(site.layer.bias, nn.Parameter(solved[-1].to(weight.dtype).contiguous()))


def _ridge(gram: Tensor, cross: Tensor, start: Tensor, ridge: float, with_bias: bool) -> Tensor:
    """Solve (X^T X + lambda I) delta = X^T (T - X start) and return start + delta; the bias is not penalised."""
    size = len(gram) if with_bias else len(gram) - 1
    penalty = ridge * gram.diagonal()[:-1].mean().clamp_min(1e-12)
    diagonal = torch.full((size,), float(penalty), dtype=gram.dtype)
    if with_bias:
        diagonal[-1] = 1e-9 * gram[-1, -1]
    left = gram[:size, :size] + torch.diag(diagonal)
    right = (cross - gram @ start)[:size]
    delta = torch.cholesky_solve(right, torch.linalg.cholesky(left))
    return torch.cat([start[:size] + delta, start[size:]])


def find_sites(dense: Graph, pruned: Graph) -> list[Site]:
    """Dense layers of the pruned graph with fewer inputs than their twins in the dense graph, in graph order."""
    uses = collections.Counter(str(x.target) for n in pruned.nodes for x in n.all_input_nodes if x.op == "get_attr")
    order = {node: i for i, node in enumerate(pruned.nodes)}
    sites = []
    for node, layer in _narrowed(dense, pruned):
        # A weight or bias that several layers share has no one target.
        if layer is not None and uses[layer.weight] == 1 and (layer.bias is None or uses[layer.bias] == 1):
            sites.append(Site(node.name, layer, _residual(node, order)))
    return sites


def find_refusals(dense: Graph, pruned: Graph, sites: Sequence[Site]) -> list[Refusal]:
    """Contractions of weights whose inputs were cut and that are not refitted."""
    refitted = {site.node for site in sites}
    return [
        Refusal("Reconstruct", node.name, "its weight or bias is shared" if layer else "no dense layer: left as it is")
        for node, layer in _narrowed(dense, pruned)
        if node.name not in refitted
    ]


def _narrowed(dense: Graph, pruned: Graph) -> Iterator[tuple[fx.Node, DenseLayer | None]]:
    """Contractions of a weight that has fewer units to sum over than in the dense graph."""
    twins = {n.name: n for n in dense.nodes}
    for node in pruned.nodes:
        layer, twin = dense_layer(node), twins.get(node.name)
        if twin is None:
            continue
        if layer is not None:
            if layer.matrix(pruned).shape[1] != layer.matrix(dense).shape[1]:
                yield node, layer
        elif is_call(node, *OTHERS) and _contracted(node) != _contracted(twin):
            yield node, None


def _contracted(node: fx.Node) -> int:
    """How many units a convolution or a grouped matmul sums over."""
    return value_of(source(node)).shape[1]


def _residual(layer: fx.Node, order: dict[fx.Node, int]) -> str | None:
    """The tensor that the layer's output is added to, when it is known before the layer runs."""
    out = layer
    users = list(out.users)
    if len(users) == 1 and is_call(users[0], aten.reshape.default):
        out = users[0]
        users = list(out.users)
    if len(users) != 1 or not is_call(users[0], aten.add.Tensor) or users[0].kwargs:
        return None
    others = [x for x in users[0].args if x is not out]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or others[0].op != "call_function":
        return None
    known = order[others[0]] < order[layer] and value_of(others[0]).shape == value_of(out).shape
    return others[0].name if known else None


class _Stepper:
    """Runs a graph on one batch, stopping where asked; keeps what later nodes still read, and what is asked for."""

    def __init__(self, graph: Graph, batch: Batch):
        self.graph, self.batch = graph, batch
        self.nodes = [n for n in graph.nodes if n.op != "output"]
        self.last_use = {read: i for i, n in enumerate(graph.nodes) for read in n.all_input_nodes}
        self.at = 0
        self.values: dict[fx.Node, Any] = {}
        self.by_name = {n.name: n for n in self.nodes}
        self.position = {n.name: i for i, n in enumerate(self.nodes)}
        self.names = dict(zip(graph.placeholders, graph.inputs, strict=True))

    def node(self, name: str) -> fx.Node:
        return self.by_name[name]

    def value(self, name: str) -> Tensor:
        return self.values[self.by_name[name]]

    def run_to(self, name: str, inclusive: bool) -> None:
        """Run up to the node called `name`; stops before it unless inclusive."""
        stop = self.position[name] + (1 if inclusive else 0)
        self._forget(self.at)
        while self.at < stop:
            node = self.nodes[self.at]
            if node.op == "placeholder":
                self.values[node] = self.batch.inputs[self.names[node]]
            elif node.op == "call_function":
                args, kwargs = map_nodes(self._read, node.args, node.kwargs)
                self.values[node] = execute(node, args, kwargs)
            self.at += 1
            # The sources of the node at the stop are still read by the caller.
            if self.at < stop:
                self._forget(self.at, node)

    def _read(self, node: fx.Node) -> Any:
        # Weights are read where they are used, so that a refitted one is seen.
        return self.graph.tensor(str(node.target)) if node.op == "get_attr" else self.values[node]

    def _forget(self, at: int, node: fx.Node | None = None) -> None:
        for held in list(self.values) if node is None else node.all_input_nodes:
            if self.last_use.get(held, -1) < at and held in self.values:
                del self.values[held]
