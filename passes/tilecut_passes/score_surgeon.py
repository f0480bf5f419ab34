"""Importance by optimal brain surgeon: what a unit's removal costs after the rest has been refitted around it.

At a gate, a dense layer W [O, I] turns activations X into outputs Y. Removing units and refitting the rest changes Y
by E; what that costs at the model's own outputs is, to second order, tr(M E^T E / n) with M = sum over positions of
g g^T, g the gradient of the loss (or of a probe of the outputs) at Y: the Fisher information of the layer factors as
X^T X x M (Martens and Grosse, K-FAC, arXiv 1503.05671). With H = (X^T X + lambda I)^-1 the units R of least cost

    cost(R) = tr(M W_R (H_RR)^-1 W_R^T) / n

go first, and W and H are updated as if they had been refitted away (Hassibi and Stork, Optimal Brain Surgeon, 1992;
structured: Kurtic et al., ZipLM, arXiv 2302.04089). Since all layers are priced at the same outputs, the curves can be
traded against each other in one knapsack, with no table of end-to-end runs. Reconstruction then does the refit.

A group that is contracted anywhere but in dense layers is scored by its gates' Fisher diagonal instead, scaled so
that both kinds of score say the same of the groups that have both (the median ratio of what losing a whole group costs).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilecut_passes.axes.groups import Group
from tilecut_passes.calibration import Batch
from tilecut_passes.dense_layer import dense_layer
from tilecut_passes.graph import Graph
from tilecut_passes.layer_statistics import LayerStatistics, collect_statistics
from tilecut_passes.mask import unit_of
from tilecut_passes.score import Progress, Ranking
from tilecut_passes.score_gates import score_fisher

# lambda, relative to the mean diagonal of X^T X: enough to invert where inputs depend on each other.
RIDGE = 1e-3
# Units that go at once: at most this part of the group.
STEPS = 96


def score_surgeon(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """Removal orders and cost curves of groups whose gates feed dense layers; the others' by Fisher diagonal."""
    surgical = surgical_groups(groups)
    if not surgical:
        return score_fisher(graph, groups, batches, seed, progress)
    others = len(surgical) < len(groups)
    steps = len(batches) + len(surgical) + (len(batches) if others else 0)
    nodes = [sink.node.name for g in surgical for sink in g.gates]
    statistics = collect_statistics(graph, nodes, batches, seed, True, lambda done, of: progress(done, steps))
    return order_units(
        graph, groups, statistics, batches, seed, lambda done, of: progress(len(batches) + done, len(batches) + of)
    )


def surgical_groups(groups: Sequence[Group]) -> list[Group]:
    """The groups whose gates all feed dense layers."""
    return [g for g in groups if g.gates and all(dense_layer(sink.node) is not None for sink in g.gates)]


def order_units(
    graph: Graph,
    groups: Sequence[Group],
    found: Mapping[str, LayerStatistics],
    batches: Sequence[Batch],
    seed: int,
    progress: Progress,
) -> dict[str, Ranking]:
    """The rankings, from statistics (with gradients) of the layers behind the surgical groups' gates."""
    surgical = surgical_groups(groups)
    others = [g for g in groups if g not in surgical]
    steps = len(surgical) + (len(batches) if others else 0)
    rankings = {}
    for i, group in enumerate(surgical):
        units = [unit_of(sink.axis, group.axis) for sink in group.gates]
        states = [_State.start(graph, found[sink.node.name]) for sink in group.gates]
        rankings[group.name] = _remove_in_order(group.size, states, units)
        progress(i + 1, steps)
    if others:
        fisher = score_fisher(graph, others + surgical, batches, seed, lambda done, of: progress(steps - of + done, steps))
        ratios = [rankings[g.name].losses[0] / fisher[g.name].losses[0] for g in surgical if fisher[g.name].losses[0]]
        scale = statistics.median(ratios) if ratios else 1.0
        rankings |= {g.name: fisher[g.name].scaled(scale) for g in others}
    return {g.name: rankings[g.name] for g in groups}


def _remove_in_order(size: int, states: Sequence[_State], units: Sequence[Tensor]) -> Ranking:
    """Remove the cheapest units, a few at a time, until none is left."""
    columns = [[(unit == u).nonzero()[:, 0] for u in range(size)] for unit in units]
    alive = list(range(size))
    order: list[int] = []
    removed = [0.0]
    while alive:
        costs = sum(state.costs([cols[u] for u in alive]) for state, cols in zip(states, columns))
        assert isinstance(costs, Tensor)
        count = min(max(size // STEPS, 1), len(alive))
        chosen = [alive[i] for i in costs.argsort(stable=True)[:count].tolist()]
        total = sum(state.remove(torch.cat([cols[u] for u in chosen])) for state, cols in zip(states, columns))
        start = removed[-1]
        removed += [start + max(total, 0.0) * (i + 1) / count for i in range(count)]
        order += chosen
        gone = set(chosen)
        alive = [u for u in alive if u not in gone]
    return Ranking(tuple(order), tuple(reversed(removed)))


@dataclass
class _State:
    """A layer while units go: its weights in the metric of the outputs, V = R W with M / n = R^T R, and H."""

    v: Tensor
    h: Tensor

    @staticmethod
    def start(graph: Graph, one: LayerStatistics) -> _State:
        assert one.fisher is not None
        gram = one.gram
        ridge = torch.full((len(gram),), float(RIDGE * gram.diagonal()[:-1].mean().clamp_min(1e-12)), dtype=gram.dtype)
        # What is always zero costs nothing to remove, whatever its weights are.
        ridge[gram.diagonal() == 0] *= 1e-6
        ridge[-1] = 1e-9 * gram[-1, -1]
        weights = torch.cat([one.layer.matrix(graph).double(), one.layer.offset(graph).double()[:, None]], 1).cpu()
        # M is positive semidefinite but for rounding: its square root comes from the eigenvalues that are positive.
        values, vectors = torch.linalg.eigh(one.fisher / max(one.rows, 1))
        root = values.clamp_min(0).sqrt()[:, None] * vectors.T
        return _State((root @ weights).float(), torch.linalg.inv(gram + torch.diag(ridge)).float())

    def costs(self, columns: Sequence[Tensor]) -> Tensor:
        """The cost of removing each set of columns alone."""
        if all(len(c) == 1 for c in columns):
            index = torch.cat(list(columns))
            return self.v[:, index].square().sum(0) / self.h.diagonal()[index].clamp_min(1e-30)
        return torch.stack([self._cost(c) for c in columns])

    def _cost(self, columns: Tensor) -> Tensor:
        part = self.v[:, columns]
        return (part * torch.linalg.solve(self.h[columns][:, columns], part.T).T).sum()

    def remove(self, columns: Tensor) -> float:
        """Remove columns, refit the others; returns the cost."""
        cost = float(self._cost(columns))
        correction = torch.linalg.solve(self.h[columns][:, columns], self.h[columns])
        self.v = self.v - self.v[:, columns] @ correction
        self.h = self.h - self.h[:, columns] @ correction
        self.v[:, columns] = 0
        return cost
