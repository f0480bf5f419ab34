"""Importance from gradients at the gates: one backward pass a batch through a graph whose gates are inputs.

fisher  mean squared gradient of the loss with respect to the unit's gate: the diagonal of the empirical Fisher
        information at the dense model (Kwon et al., A Fast Post-Training Pruning Framework for Transformers,
        arXiv 2204.09656)
taylor  |mean gradient|, the first-order change of the loss (Molchanov et al., arXiv 1906.10771)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tilecut_passes.axes.groups import Group
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.mask import gate
from tilecut_passes.measure_loss import measure_loss
from tilecut_passes.score import Progress, Ranking


def score_fisher(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """Diagonal Fisher information of the gates."""
    means = _mean_over_batches(graph, groups, batches, seed, progress, lambda gradient: gradient.square())
    return {name: Ranking.of_scores(mean) for name, mean in means.items()}


def score_taylor(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """First-order change of the loss."""
    means = _mean_over_batches(graph, groups, batches, seed, progress, lambda gradient: gradient)
    return {name: Ranking.of_scores(mean.abs()) for name, mean in means.items()}


def _mean_over_batches(
    graph: Graph,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    seed: int,
    progress: Progress,
    statistic: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The mean over batches of a statistic of the gates' gradients."""
    gated = gate(graph, [g.name for g in groups])
    generator = torch.Generator().manual_seed(seed)
    totals = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups}
    for i, batch in enumerate(batches):
        gates = gated.open_gates(requires_grad=True)
        with torch.enable_grad():
            loss = measure_loss(gated.run(batch.inputs, gates), batch, generator)
            gradients = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
        for name, gradient in zip(gates, gradients):
            if gradient is not None:
                totals[name] += statistic(gradient.double().cpu())
        progress(i + 1, len(batches))
    return {name: total / len(batches) for name, total in totals.items()}
