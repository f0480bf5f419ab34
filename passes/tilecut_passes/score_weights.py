"""Importance from weights alone: the norm of everything that a unit owns, over all of its tensors. No data.

    magnitude     L2 (Han et al., Learning both Weights and Connections, arXiv 1506.02626; structured: Li et al., Pruning
                  Filters for Efficient ConvNets, arXiv 1608.08710, who take L1)
    magnitude_l1  L1

A norm says nothing across layers. So scores are relative to their group's mean, and `price_by_parameters` makes losses
of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tilecut_passes.axes.groups import Group
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.score import Progress, Ranking


def score_magnitude(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """L2 norm of everything that a unit owns."""
    return _score_norms(graph, groups, progress, torch.square, torch.sqrt)


def score_magnitude_l1(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """L1 norm of everything that a unit owns."""
    return _score_norms(graph, groups, progress, torch.abs, lambda total: total)


def _score_norms(
    graph: Graph,
    groups: Sequence[Group],
    progress: Progress,
    term: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor], Tensor],
) -> dict[str, Ranking]:
    scores = {}
    for i, group in enumerate(groups):
        total = torch.zeros(group.size, dtype=torch.float64)
        for units in member_slices(graph, group):
            total += term(units.double()).reshape(group.size, -1).sum(1).cpu()
        scores[group.name] = relative(finish(total))
        progress(i + 1, len(groups))
    return price_by_parameters(graph, groups, scores)


def relative(scores: Tensor) -> Tensor:
    """Scores in units of their mean."""
    return scores / scores.mean().clamp_min(torch.finfo(torch.float64).tiny)


def price_by_parameters(graph: Graph, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, Ranking]:
    """Rankings from scores [U] that have no unit: what a unit costs is its score times its part of all parameters.

    A knapsack over parameters then removes whatever is under one threshold of the score, wherever it is, be a unit a
    head or a neuron; with scores whose mean is 1, all groups together cost 1.
    """
    owned = {g.name: sum(units.numel() for units in member_slices(graph, g)) for g in groups}
    whole = sum(owned.values())
    return {g.name: Ranking.of_scores(scores[g.name] * (owned[g.name] / g.size / whole)) for g in groups}


def member_slices(graph: Graph, group: Group) -> Iterator[Tensor]:
    """For each member that is a weight, its part with the group's units first: [size, ..]."""
    for member in group.members:
        tensor = graph.tensor(member.parameter).detach()
        if tensor.is_floating_point():
            part = tensor.narrow(member.dim, member.start, math.prod(member.view)).unflatten(member.dim, member.view)
            yield part.movedim(member.dim + member.axis, 0)
