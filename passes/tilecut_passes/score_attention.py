"""Importance by attention strength: how sharply a head attends.

For a head, the largest weight that a query gives to a key, averaged over the real queries that see a key: the
confidence of Voita et al. (Analyzing Multi-Head Self-Attention, arXiv 1905.09418), who found that confident heads are
the ones that do the work. (The plain mean of attention weights is 1 / keys for every head.) A KV group has the sum of
its heads, a query index the sum over the KV groups. Nothing behind the softmax is seen: neither values nor the output
projection.

The attention of a group is any `scaled_dot_product_attention`, `tilecut::attention` or softmax in whose weights the
group's units are a batch dimension. The op itself is asked for its weights, with the identity as values, so that scale,
mask and causality are its own. Several attentions of a group, shared by layers, add up. Units of no attention (neurons)
are scored by the mean absolute activation at their gates, over each unit's indices and over the group's sinks.

Losses: confidences are relative to the mean over all heads of the model, activations to their group's mean; then both
are priced by parameters (`score_weights.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.axes.axis import product
from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.infer import Types, infer
from tilecut_passes.calibration import Batch
from tilecut_passes.check_finite import check_values
from tilecut_passes.graph import Graph, arguments, execute, is_call, map_nodes, value_of
from tilecut_passes.mask import unit_of
from tilecut_passes.score import Progress, Ranking
from tilecut_passes.score_activations import mean_activations
from tilecut_passes.score_weights import price_by_parameters, relative
from tilecut_passes.share_batches import own_share, total

aten = torch.ops.aten
FUSED = (aten.scaled_dot_product_attention.default, torch.ops.tilecut.attention.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


@dataclass(frozen=True)
class _Attention:
    """An attention node.

    Attributes:
        split: how many heads lie within the first dimension, behind the batch; or None.
        heads: how many heads there are.
        units: by group name, the dimension of its units (after the split), and for every index there the unit.
    """

    split: int | None
    heads: int
    units: dict[str, tuple[int, Tensor]]


def score_attention(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """Confidences of heads; mean absolute activations of other units."""
    attentions = _find_attentions(graph, {g.name for g in groups})
    attending = {name for attention in attentions.values() for name in attention.units}
    others = [g for g in groups if g.name not in attending]
    parts = bool(attending) + bool(others)
    scores = {}
    if attending:
        found = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups if g.name in attending}
        confidences = _confidences(graph, attentions, batches, lambda done, of: progress(done, of * parts))
        for (_, name), units in confidences.items():
            found[name] += units[:-1]
        mean = torch.cat(list(found.values())).mean().clamp_min(torch.finfo(torch.float64).tiny)
        scores |= {name: one / mean for name, one in found.items()}
    if others:
        means = mean_activations(graph, others, batches, lambda done, of: progress((parts - 1) * of + done, of * parts))
        scores |= {name: relative(one) for name, one in means.items()}
    return price_by_parameters(graph, groups, scores)


def _find_attentions(graph: Graph, wanted: set[str]) -> dict[str, _Attention]:
    """By node name, the attentions that units of the wanted groups batch."""
    axes = infer(graph)
    names = {group.axis: group.name for group in find_groups(axes)}
    found = {}
    for node in graph.nodes:
        if is_call(node, *FUSED):
            types: Types = axes.input(node)
        elif is_call(node, *SOFTMAXES) and value_of(node).ndim >= 3 and _runs_over_last(node):
            types = axes.of[node]
        else:
            continue
        batch: Types = list(types[:-2])
        split = None
        # [batch * heads, Sq, Sk], as bmm wants it.
        static = list(itertools.takewhile(lambda factor: factor.is_static, reversed(batch[0].factors)))
        if not batch[0].root.is_static and static:
            inner = product(static[::-1])
            split = int(inner.root.size)
            batch = [batch[0], inner, *batch[1:]]
        units = {}
        heads = 1
        for d, axis in enumerate(batch):
            here = [leaf for leaf in dict.fromkeys(axis.leaves) if leaf in names] if axis.root.is_static else []
            heads *= int(axis.root.size) if here else 1
            units |= {names[leaf]: (d, unit_of(axis, leaf)) for leaf in here if names[leaf] in wanted}
        if units:
            found[node.name] = _Attention(split, heads, units)
    return found


def _runs_over_last(softmax: fx.Node) -> bool:
    rank = value_of(softmax).ndim
    return arguments(softmax)["dim"] % rank == rank - 1


def _confidences(
    graph: Graph, attentions: dict[str, _Attention], batches: Sequence[Batch], progress: Callable[[int, int], None]
) -> dict[tuple[str, str], Tensor]:
    """By attention and group, the confidence of every unit's heads together; one more for heads of no unit."""
    reader = _Reader(graph, attentions)
    own = own_share(batches)
    for done, (_, batch) in enumerate(own):
        reader.batch = batch
        with torch.no_grad():
            reader.run(*(batch.inputs[name] for name in graph.inputs))
        progress(done + 1, len(own))
    found = {}
    for (node, name), sums in reader.sums.items():
        _, unit = attentions[node].units[name]
        # How many heads an index along the units' dimension stands for.
        heads = attentions[node].heads / len(unit)
        means = total(sums) * heads / total(reader.counts[node, name]).clamp_min(1)
        size = int(unit.max()) + 1
        found[node, name] = torch.zeros(size + 1, dtype=torch.float64).index_add_(0, unit, means)
    return found


class _Reader(fx.Interpreter):
    """Runs a graph on a batch and adds up the largest weights of its attentions."""

    def __init__(self, graph: Graph, attentions: dict[str, _Attention]):
        super().__init__(graph.module)
        self.source, self.attentions = graph, attentions
        self.batch = Batch({})
        keys = [(node, name, len(unit)) for node, one in attentions.items() for name, (_, unit) in one.units.items()]
        self.sums = {(node, name): torch.zeros(size, dtype=torch.float64) for node, name, size in keys}
        self.counts = {(node, name): torch.zeros(size, dtype=torch.float64) for node, name, size in keys}

    def run_node(self, n: fx.Node) -> Any:
        attention = self.attentions.get(n.name)
        weights = self._weights(n) if attention is not None and is_call(n, *FUSED) else None
        result = super().run_node(n)
        if attention is not None:
            self._add(n.name, attention, result if weights is None else weights)
        return result

    def _weights(self, n: fx.Node) -> Tensor:
        """What a fused attention gives for the identity as values: its weights, [.., H, Sq, Sk]."""
        args, kwargs = map_nodes(lambda x: self.env[x], n.args, n.kwargs)
        k = args[1]
        identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:-1], k.shape[-2])
        return execute(n, [*args[:2], identity, *args[3:]], kwargs)

    def _add(self, node: str, attention: _Attention, weights: Tensor) -> None:
        strongest = weights.amax(-1).double()
        if attention.split is not None:
            strongest = strongest.unflatten(0, (-1, attention.split))
        mask = self.batch.mask
        real = torch.ones_like(strongest, dtype=torch.bool)
        if mask is not None and (strongest.shape[0], strongest.shape[-1]) == tuple(mask.shape):
            real = real & (mask != 0).reshape(len(mask), *[1] * (strongest.ndim - 2), -1)
        check_values(self.source, self.batch.inputs, {node: strongest[real]})
        # A query that sees no key has no weights.
        real = real & (strongest > 0)
        strongest = strongest.where(real, 0)
        for name, (dim, _) in attention.units.items():
            others = [d for d in range(strongest.ndim) if d != dim]
            self.sums[node, name] += strongest.sum(others).cpu()
            self.counts[node, name] += real.sum(others).cpu()
