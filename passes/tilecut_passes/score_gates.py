"""Importance from gradients at the gates: one backward pass a batch through a graph whose gates are inputs.

    fisher        mean squared gradient of the loss with respect to the unit's gate: the diagonal of the empirical
                  Fisher information at the dense model (Kwon et al., A Fast Post-Training Pruning Framework for
                  Transformers, arXiv 2204.09656)
    fisher_block  the same with the correlations within a group: F = mean over batches of g g^T [U, U]. The unit that
                  raises 1_R^T F 1_R least joins the removed units R, again and again; that form is the loss (the
                  matrix is the one of Kwon's rearrangement)
    taylor        |mean gradient|, the first-order change of the loss (Molchanov et al., arXiv 1906.10771)

The loss is the task's where there are labels, and then batches without labels are left out; else a random probe of the
outputs, whose squared gradient is a relative squared distance to the dense outputs (`measure_loss.py`). Taylor needs
labels: without them the loss is at its minimum, and there is no first order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tilecut_passes.axes.groups import Group
from tilecut_passes.calibration import Batch
from tilecut_passes.check_finite import check_values
from tilecut_passes.graph import Graph
from tilecut_passes.mask import gate
from tilecut_passes.measure_loss import measure_loss
from tilecut_passes.score import Progress, Ranking
from tilecut_passes.share_batches import batch_generator, own_share, total


def score_fisher(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """Diagonal Fisher information of the gates."""
    means = _mean_over_batches(graph, groups, batches, seed, progress, torch.square)
    return {name: Ranking.of_scores(mean) for name, mean in means.items()}


def score_taylor(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """First-order change of the loss."""
    means = _mean_over_batches(graph, groups, batches, seed, progress, lambda gradient: gradient)
    return {name: Ranking.of_scores(mean.abs()) for name, mean in means.items()}


def score_fisher_block(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """Greedy removal by the Fisher information of each group, correlations within it included."""
    matrices = fisher_matrices(graph, groups, batches, seed, progress)
    return {name: remove_greedily(matrix) for name, matrix in matrices.items()}


def fisher_matrices(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Tensor]:
    """By group name, the empirical Fisher information of its gates: the mean over batches of g g^T, float64 [U, U]."""
    return _mean_over_batches(graph, groups, batches, seed, progress, lambda g: torch.outer(g, g), rank=2)


def remove_greedily(fisher: Tensor) -> Ranking:
    """Remove the unit whose going raises 1_R^T F 1_R least until none is left; ties go to the higher index first.

    Units whose gradients cancel can lower the form, more so the fewer batches there are. A loss is therefore the largest
    form on the way: what removing less costs, removing more costs too.
    """
    size = len(fisher)
    # What removing unit u adds: F_uu + 2 sum over r in R of F_ur.
    rise = fisher.diagonal().clone()
    order: list[int] = []
    form = 0.0
    losses = [0.0]
    for _ in range(size):
        unit = size - 1 - int(rise.flip(0).argmin())
        form += float(rise[unit])
        losses.append(max(form, losses[-1]))
        order.append(unit)
        rise += 2 * fisher[unit]
        rise[unit] = float("inf")
    return Ranking(tuple(order), tuple(reversed(losses)))


def labelled(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The batches that a loss is measured on: those with labels, or all where none has any."""
    return [b for b in batches if b.labels is not None] or batches


def _mean_over_batches(
    graph: Graph,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    seed: int,
    progress: Progress,
    statistic: Callable[[Tensor], Tensor],
    rank: int = 1,
) -> dict[str, Tensor]:
    """The mean over batches of a statistic [U] * rank of the gates' gradients [U]."""
    gated = gate(graph, [g.name for g in groups])
    used = labelled(batches)
    own = own_share(used)
    totals = {g.name: torch.zeros([g.size] * rank, dtype=torch.float64) for g in groups}
    for done, (i, batch) in enumerate(own):
        gates = gated.open_gates(requires_grad=True)
        with torch.enable_grad():
            loss = measure_loss(gated.run(batch.inputs, gates), batch, batch_generator(seed, i))
            gradients = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
        found = {name: g.double().cpu() for name, g in zip(gates, gradients) if g is not None}
        check_values(graph, batch.inputs, found)
        for name, gradient in found.items():
            totals[name] += statistic(gradient)
        progress(done + 1, len(own))
    return {name: total(summed) / len(used) for name, summed in totals.items()}
