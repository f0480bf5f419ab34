"""Importance by output sensitivity: how far the outputs move when one unit is gated off.

The measure is the size of `measure_divergence`: the change of the loss where there are labels (batches without are left
out then), up or down, since a small sample cannot tell which units the task is better off without (Michel et al., Are
Sixteen Heads Really Better than One?, arXiv 1905.10650); else the KL of logits, or half the relative squared distance
of other outputs.

One run a unit is dear, so what is run is bounded. At most BATCHES batches, evenly spread, of which the first ROWS rows
(all rows, where the inputs do not all have one and the same leading dynamic size). At most RUNS runs a group: a larger
group is ordered by a prior (wanda, squared: a distance) and gated off in blocks of neighbours; the block's measured cost
is divided among its units in proportion to the prior. Only what depends on a gate is run again: the rest of the dense
run is kept.

Losses add up over units, in the measure's own unit, the same for all groups: what units do together is not seen, nor
is a second copy of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from tilecut_passes.axes.groups import Group
from tilecut_passes.calibration import Batch
from tilecut_passes.check_finite import check_values
from tilecut_passes.graph import Graph
from tilecut_passes.mask import GatedGraph, gate
from tilecut_passes.measure_divergence import measure_divergence
from tilecut_passes.score import Progress, Ranking
from tilecut_passes.score_activations import Moments, contraction_scores
from tilecut_passes.score_gates import labelled
from tilecut_passes.share_batches import own_share, total

BATCHES = 2
ROWS = 8
RUNS = 64


def score_sensitivity(
    graph: Graph, groups: Sequence[Group], batches: Sequence[Batch], seed: int, progress: Progress
) -> dict[str, Ranking]:
    """Divergences of the outputs with units gated off, one by one or block by block."""
    used = pick_rows(graph, labelled(batches))
    priors = contraction_scores(graph, groups, used, lambda done, of: None, Moments.wanda)
    blocks = {g.name: _blocks(priors[g.name]) for g in groups}
    own = own_share(used)
    runs = len(own) * sum(map(len, blocks.values()))
    done = 0
    moved = {name: torch.zeros(len(own_blocks), dtype=torch.float64) for name, own_blocks in blocks.items()}
    gated = gate(graph, list(blocks))
    for _, batch in own:
        dense = _DenseRun(gated, batch)
        check_values(graph, batch.inputs, {k: v for k, v in dense.outputs.items() if v.is_floating_point()})
        for name, own_blocks in blocks.items():
            known = dense.independent_of(name)
            for i, block in enumerate(own_blocks):
                outputs = dense.run_without(name, block, known)
                moved[name][i] += measure_divergence(dense.outputs, outputs, batch) / len(used)
                done += 1
                progress(done, runs)
    return {g.name: _rank(total(moved[g.name]), blocks[g.name], priors[g.name]) for g in groups}


def pick_rows(graph: Graph, batches: Sequence[Batch]) -> list[Batch]:
    """The batches and rows that are run: a few, evenly spread."""
    count = min(len(batches), BATCHES)
    chosen = [batches[i * len(batches) // count] for i in range(count)]
    leading = {spec.shape[0] if spec.shape else None for spec in graph.input_specs()}
    if len(leading) > 1 or not leading <= graph.row_sizes():
        return chosen
    return [
        replace(
            b, inputs={k: v[:ROWS] for k, v in b.inputs.items()}, labels=None if b.labels is None else b.labels[:ROWS]
        )
        for b in chosen
    ]


def _blocks(prior: Tensor) -> list[Tensor]:
    """Units that are gated off together: of like prior, at most RUNS sets."""
    order = prior.argsort(stable=True)
    return list(order.tensor_split(min(RUNS, len(order))))


def _rank(moved: Tensor, blocks: Sequence[Tensor], prior: Tensor) -> Ranking:
    """Divide what blocks cost among their units."""
    scores = torch.zeros(len(prior), dtype=torch.float64)
    for cost, block in zip(moved.abs(), blocks):
        part = prior[block].square()
        whole = part.sum()
        scores[block] = cost * (part / whole if whole > 0 else torch.full_like(part, 1 / len(part)))
    return Ranking.of_scores(scores)


class _DenseRun(fx.Interpreter):
    """The values of all nodes with open gates, from which runs with closed ones start."""

    def __init__(self, gated: GatedGraph, batch: Batch):
        super().__init__(gated.graph.module, garbage_collect_values=False)
        self.gated = gated
        self.gates = {f"gate:{name}": vector for name, vector in gated.open_gates().items()}
        self.inputs: Mapping[str, Tensor] = {**batch.inputs, **self.gates}
        self.outputs = self._run({}, self.inputs)
        self.values = dict(self.env)

    def _run(self, known: dict[fx.Node, object], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = self.gated.graph
        with torch.no_grad():
            results = self.run(*(inputs[name] for name in graph.inputs), initial_env=known)
        return dict(zip(graph.outputs, results, strict=True))

    def independent_of(self, group: str) -> dict[fx.Node, object]:
        """The values that the gate of a group does not reach."""
        reached = {self.gated.graph.input_node(f"gate:{group}")}
        for node in self.gated.graph.nodes:
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        return {n: value for n, value in self.values.items() if n not in reached and n.op != "placeholder"}

    def run_without(self, group: str, units: Tensor, known: Mapping[fx.Node, object]) -> dict[str, Tensor]:
        """The outputs with units of a group gated off."""
        name = f"gate:{group}"
        closed = self.gates[name].index_fill(0, units.to(self.gates[name].device), 0)
        return self._run(dict(known), {**self.inputs, name: closed})
