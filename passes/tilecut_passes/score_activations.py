"""Importance from activations and the weights that contract them: forward passes alone, no labels.

    wanda  sum over the weights that contract the unit of |W_ij| ||x_j||_2 (Sun et al., A Simple and Effective Pruning
           Approach for Large Language Models, arXiv 2306.11695)
    flap   fluctuation: the variance of x_j over the data times ||W_:j||^2, summed over the unit: what replacing the
           unit by its mean loses (An et al., Fluctuation-based Adaptive Structured Pruning, arXiv 2312.11983)
    reap   mean norm of what the unit adds to its layer's output, over the positions where it adds anything; for an
           expert that is its gate times its output (Lasby et al., REAP the Experts, arXiv 2510.13999)

Experts of sorted rows have no sink: wanda and flap are those of the inputs of their last matrices, and reap is over the
rows that are routed to them, the router's weight included where it multiplies the rows before they are put in order.

All three add up over the sinks of a group. A unit's term is x_u W_u at a weight, the product at a matmul of two
activations (gate times expert), and what is summed at a sum (`read_contractions.py`). Sums stream in float64: memory
does not depend on the number of batches.

Losses: wanda and reap compare units within a layer, so they are relative to their group's mean. flap's are standardised
within the group, as in the paper, and lifted by one constant for all groups so that none is negative. All are then
priced by parameters (`score_weights.py`): one threshold for all layers, as flap has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilecut_passes.axes.expert_rows import ExpertRows
from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Sink
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.mask import unit_of
from tilecut_passes.read_contractions import Terms, read_contractions, read_expert_rows
from tilecut_passes.score import Progress, Ranking
from tilecut_passes.score_weights import price_by_parameters, relative
from tilecut_passes.share_batches import total

Key = tuple[str, int, int]


def score_wanda(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """Magnitudes of weights times norms of what they multiply."""
    scores = contraction_scores(graph, groups, batches, progress, Moments.wanda)
    return price_by_parameters(graph, groups, {name: relative(one) for name, one in scores.items()})


def score_flap(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """Fluctuations around the mean, standardised."""
    scores = contraction_scores(graph, groups, batches, progress, Moments.flap)
    standard = {name: _standardise(one) for name, one in scores.items()}
    least = min(float(one.min()) for one in standard.values())
    return price_by_parameters(graph, groups, {name: one - least for name, one in standard.items()})


def score_reap(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """Norms of what units add, where they are active."""
    sites = [(group, sink) for group in groups for sink in group.gates]
    columns = [_columns(sink, group) for group, sink in sites]
    norms = [torch.zeros(group.size, dtype=torch.float64) for group, _ in sites]
    active = [torch.zeros(group.size, dtype=torch.float64) for group, _ in sites]

    def visit(sink: Sink, terms: Terms) -> None:
        for i, (_, one) in enumerate(sites):
            if _key(one) == _key(sink):
                added = _added_norms(terms, columns[i])
                norms[i] += added.sum(0, dtype=torch.float64).cpu()
                active[i] += (added != 0).sum(0).cpu()

    counts = read_contractions(graph, [sink for _, sink in sites], batches, progress, visit)
    scores = _routed_norms(graph, groups, batches)
    for (group, _), norm, times in zip(sites, _sum_up(norms, counts), _sum_up(active, counts)):
        scores[group.name] += norm / times.clamp_min(1)
    return price_by_parameters(graph, groups, {name: relative(one) for name, one in scores.items()})


def _routed_norms(graph: Graph, groups: Sequence[Group], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By group name, the mean norm [U] of the rows that experts add to, each where it is routed to."""
    sites = [(group, rows) for group in groups for rows in group.rows]
    sums = [torch.zeros(group.size + 1, dtype=torch.float64) for group, _ in sites]
    times = [torch.zeros(group.size + 1, dtype=torch.float64) for group, _ in sites]

    def visit(i: int, added: Tensor, expert: Tensor) -> None:
        group, rows = sites[i]
        unit = unit_of(rows.axis, group.axis)[expert.cpu()]
        sums[i].index_add_(0, unit, added.flatten(1).norm(dim=1).double().cpu())
        times[i].index_add_(0, unit, torch.ones(len(unit), dtype=torch.float64))

    counts = read_expert_rows(graph, [rows for _, rows in sites], batches, visit) if sites else True
    scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    for (group, _), norm, count in zip(sites, _sum_up(sums, counts), _sum_up(times, counts)):
        scores[group.name] += norm[:-1] / count[:-1].clamp_min(1)
    return scores


def mean_activations(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], progress: Progress
) -> dict[str, Tensor]:
    """By group name, the mean absolute activation [U] at the gates, over each unit's indices, summed over the sinks."""
    found = contraction_scores(graph, groups, batches, progress, Moments.strength)
    sizes = {g.name: [int((unit_of(s.axis, g.axis) < g.size).sum()) / g.size for s in g.gates] for g in groups}
    for group in groups:
        sizes[group.name] += [int(rows.contracted.root.size) for rows in group.rows]
    return {name: one / (sum(sizes[name]) / len(sizes[name])) for name, one in found.items()}


def contraction_scores(
    graph: Graph,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    progress: Progress,
    statistic: Callable[[Moments], Tensor],
) -> dict[str, Tensor]:
    """By group name, a statistic [G, K] of what the sinks contract, summed over each unit's indices and over the sinks.

    Units are indices along the sink; experts of sorted rows are matrices.
    """
    sinks = {_key(sink): sink for group in groups for sink in (*group.gates, *map(_product, group.rows))}
    moments: dict[Key, Moments] = {}

    def visit(sink: Sink, terms: Terms) -> None:
        if _key(sink) not in moments:
            moments[_key(sink)] = Moments.start(terms)
        moments[_key(sink)].add(terms)

    counts = read_contractions(graph, sinks.values(), batches, progress, visit)
    at = {}
    for key in sinks:
        held = moments[key]
        _sum_up([held.count, held.sums, held.sizes, held.squares], counts)
        at[key] = statistic(held)
    scores = {}
    for group in groups:
        units = torch.zeros(group.size + 1, dtype=torch.float64)
        for sink in group.gates:
            units.index_add_(0, unit_of(sink.axis, group.axis), at[_key(sink)].sum(0))
        for rows in group.rows:
            units.index_add_(0, unit_of(rows.axis, group.axis), at[_key(_product(rows))].sum(1))
        scores[group.name] = units[: group.size]
    return scores


@dataclass
class Moments:
    """Of one sink, by matrix: the number of rows [G], sums of x, |x| and x^2 [G, K, F], norms of the columns [G, K]."""

    count: Tensor
    sums: Tensor
    sizes: Tensor
    squares: Tensor
    l1: Tensor
    l2_squared: Tensor

    @staticmethod
    def start(terms: Terms) -> Moments:
        """Nothing seen yet."""
        width, features = terms.x.shape[1], terms.x.shape[2] if terms.weight is None else 1

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(terms.matrices, *shape, dtype=torch.float64)

        sums, sizes, squares = (zeros(width, features) for _ in range(3))
        return Moments(zeros(), sums, sizes, squares, zeros(width), zeros(width))

    def add(self, terms: Terms) -> None:
        """One more batch."""
        x = (terms.x if terms.weight is None else terms.x[..., None]).double()
        self.count[terms.matrix] += len(x)
        self.sums[terms.matrix] += x.sum(0).cpu()
        self.sizes[terms.matrix] += x.abs().sum(0).cpu()
        self.squares[terms.matrix] += x.square().sum(0).cpu()
        one = torch.ones(1, dtype=torch.float64)
        self.l1[terms.matrix] = one if terms.weight is None else terms.weight.abs().sum(1, dtype=torch.float64).cpu()
        self.l2_squared[terms.matrix] = (
            one if terms.weight is None else terms.weight.square().sum(1, dtype=torch.float64).cpu()
        )

    def wanda(self) -> Tensor:
        """[G, K]: the norm of each input times the L1 norm of its weights."""
        return self.squares.sqrt().sum(-1) * self.l1

    def flap(self) -> Tensor:
        """[G, K]: the variance of each input times the squared norm of its weights; matrices by how many rows they see."""
        rows = self.count.clamp_min(1)[:, None, None]
        variance = (self.squares / rows - (self.sums / rows).square()).clamp_min(0).sum(-1)
        share = self.count / self.count.sum().clamp_min(1)
        return share[:, None] * variance * self.l2_squared

    def strength(self) -> Tensor:
        """[G, K]: the mean absolute input."""
        return self.sizes.mean(-1) / self.count.sum().clamp_min(1)


def _key(sink: Sink) -> Key:
    return sink.node.name, sink.argument, sink.dim


def _product(rows: ExpertRows) -> Sink:
    """What the last product of sorted rows contracts."""
    return Sink(rows.product, 0, 1, rows.contracted)


def _sum_up(states: Sequence[Tensor], counts: bool) -> Sequence[Tensor]:
    """Sums over all processes, in place; this one's are left out unless they count."""
    for state in states:
        total(state if counts else state.zero_())
    return states


def _columns(sink: Sink, group: Group) -> list[Tensor]:
    """For every unit, its indices along the sink."""
    unit = unit_of(sink.axis, group.axis)
    return [(unit == u).nonzero()[:, 0] for u in range(group.size)]


def _added_norms(terms: Terms, columns: Sequence[Tensor]) -> Tensor:
    """[n, U]: the norm of what every unit adds at every position."""
    x, weight = terms.x, terms.weight
    if all(len(own) == 1 for own in columns):
        index = torch.cat(list(columns))
        return x[:, index].abs() * weight[index].norm(dim=1) if weight is not None else x[:, index].norm(dim=2)
    added = [x[:, own].sum(1) if weight is None else x[:, own] @ weight[own] for own in columns]
    return torch.stack([one.norm(dim=1) for one in added], 1)


def _standardise(scores: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1; zeros where all are equal."""
    spread = scores.std()
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)
