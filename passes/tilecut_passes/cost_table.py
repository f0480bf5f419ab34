"""Cost table: what is lost end to end when one group alone keeps k of its units, for a grid of legal sizes.

Before: the dense graph, its groups, their removal orders (`Ranking.order`, by any importance), calibration batches.
After: a `Ranking` for every group whose losses are measured: the divergence of the model's own outputs
(`measure_divergence.py`), label-free or the task's loss. One table serves every budget, lattice and target.

A row is measured with the weights behind the gate refitted around the missing units (ridge, from the Gram matrix of the
dense activations: `layer_statistics.py`), since that is what reconstruction will do; where what reads the gate is no
dense layer, or a weight that other calls share, the gate is multiplied by 0. Experts win nothing (`close_contests.py`).
Only what runs after the gate is run again.

Between measured sizes the importance's own curve is followed: the ratio of measured to predicted loss is interpolated
(its logarithm, linearly). Curves never rise with more units.

Measured per-module, per-size losses traded in one search: ZipLM (Kurtic et al., arXiv 2302.04089); here end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Contest, Sink
from tilecut_passes.calibration import Batch
from tilecut_passes.close_contests import close_contest
from tilecut_passes.dense_layer import dense_layer
from tilecut_passes.graph import Graph
from tilecut_passes.layer_statistics import LayerStatistics
from tilecut_passes.mask import along, multiply_at, unit_of
from tilecut_passes.measure_divergence import measure_divergence
from tilecut_passes.score import Ranking
from tilecut_passes.share_batches import own_share, total
from tilecut_passes.solve_layer import RidgeFactor
from tilecut_passes.step_graph import Schedule, Stepper
from tilecut_runtime.errors import CalibrationError

# Sizes measured of a group: all where there are few, else spread so that small ones lie closer together.
MOST_SIZES = 13
# Positions (or rows) that a row of the table is measured on, and numbers of the dense outputs held for it.
POSITIONS, NUMBERS = 6000, 2**26
RIDGE = 1e-2
# Losses below this are no losses: ratios are taken of what is larger.
FLOOR = 1e-12

Rows = Mapping[tuple[str, int], float]


def grid(sizes: Sequence[int], most: int = MOST_SIZES) -> list[int]:
    """At most about `most` of the legal sizes below the dense one, the smallest and the largest included."""
    smaller = sorted(sizes)[:-1]
    if len(smaller) <= most:
        return smaller
    # Losses bend most where little is left: squares put more points there.
    at = (np.linspace(0, 1, most) ** 1.5 * (len(smaller) - 1)).round().astype(int)
    return [smaller[i] for i in dict.fromkeys(at.tolist())]


def table_batches(graph: Graph, batches: Sequence[Batch], outputs: Sequence[str]) -> list[Batch]:
    """Batches spread evenly over all, about as many as `POSITIONS` allows; labelled ones where there are any."""
    chosen = [b for b in batches if b.labels is not None] or list(batches)
    widths = [s.shape[-1] for s in graph.output_specs() if s.name in set(outputs) and s.shape]
    width = sum(w for w in widths if isinstance(w, int))
    positions = min(POSITIONS, max(NUMBERS // max(width, 1), 1))
    held = sum(batch.positions for batch in chosen)
    count = max(min(len(chosen), round(len(chosen) * positions / max(held, 1))), 1)
    return [chosen[int((i + 0.5) * len(chosen) / count)] for i in range(count)]


def measure_rows(
    graph: Graph,
    groups: Sequence[Group],
    rankings: Mapping[str, Ranking],
    wanted: Sequence[tuple[str, int]],
    statistics: Mapping[str, LayerStatistics],
    batches: Sequence[Batch],
    outputs: Sequence[str],
    found: Callable[[str, int, float], None],
) -> None:
    """Measure the wanted (group, size) rows; `found` is told of each as soon as it is known.

    Args:
        statistics: of the dense layers behind gates, by the calls' names; gates without are multiplied by 0.
        batches: what to measure on (`table_batches`).
        outputs: the outputs that count.
    """
    by_name = {g.name: g for g in groups}
    trials = _Trials(graph, groups, statistics)
    schedule = Schedule(trials.graph)
    shares = own_share(batches)
    chosen = set(outputs)
    with torch.no_grad():
        dense = [{k: v for k, v in graph.run(b.inputs).items() if k in chosen} for _, b in shares]
        for name in dict.fromkeys(name for name, _ in wanted):
            group = by_name[name]
            start = min((schedule.position[node.name] for node in trials.first[group.name]), default=0)
            runs = [_Replay(schedule, batch, start) for _, batch in shares]
            for size in sorted((n for g, n in wanted if g == name), reverse=True):
                kept = torch.zeros(group.size, dtype=torch.bool)
                kept[list(rankings[name].best(size))] = True
                with trials.cut(group, kept):
                    losses = [
                        measure_divergence(want, {**want, **run.outputs(chosen)}, run.batch)
                        for want, run in zip(dense, runs)
                    ]
                held = total(torch.tensor([sum(losses), float(len(losses))], dtype=torch.float64))
                found(name, size, float(held[0] / held[1]))


def curves(groups: Sequence[Group], rankings: Mapping[str, Ranking], rows: Rows) -> dict[str, Ranking]:
    """The rankings with measured losses, interpolated between the measured sizes; a group without rows keeps its own.

    Below the smallest measured size the loss is extrapolated along the importance's curve.
    """
    out = {}
    for group in groups:
        measured = sorted((n, loss) for (name, n), loss in rows.items() if name == group.name and n < group.size)
        ranking = rankings[group.name]
        if not measured:
            out[group.name] = ranking
            continue
        sizes = [n for n, _ in measured]
        # A loss measured below zero (the task's own may be) is none, and one below that of more units is noise.
        losses = np.maximum.accumulate(np.maximum([loss for _, loss in measured], 0.0)[::-1])[::-1]
        predicted = np.maximum(np.asarray(ranking.losses), FLOOR)
        # What the importance takes for free has no shape to follow: there a straight line does.
        if (np.asarray(ranking.losses)[sizes] <= FLOOR).any():
            curve = np.interp(np.arange(group.size + 1), [*sizes, group.size], [*losses, 0.0])
        else:
            ratio = np.log(np.maximum(losses, FLOOR) / predicted[sizes])
            curve = predicted * np.exp(np.interp(np.arange(group.size + 1), sizes, ratio))
        # No size loses more than the next smaller measured one, or less than the next larger.
        smaller = np.searchsorted(sizes, np.arange(group.size + 1), side="right") - 1
        most = np.where(smaller < 0, np.inf, losses[np.maximum(smaller, 0)])
        curve = np.minimum(curve, most)
        curve[group.size] = 0.0
        rising = np.maximum.accumulate(curve[::-1])[::-1]
        out[group.name] = Ranking(ranking.order, tuple(rising.tolist()))
    return out


@dataclass
class _Refit:
    """A dense layer behind a gate: its weight and bias with all units, as [O, I + 1], and X^T X of what it reads."""

    one: LayerStatistics
    held: Tensor
    gram: Tensor
    unit: Tensor


class _Trials:
    """A copy of the graph in which units of one group at a time can be taken out."""

    def __init__(self, graph: Graph, groups: Sequence[Group], statistics: Mapping[str, LayerStatistics]):
        self.graph = graph.copy()
        twins = {n.name: n for n in self.graph.nodes}
        shared = _shared_weights(self.graph)
        self.statistics = statistics
        # The node from which on the graph must be run again.
        self.reads: dict[tuple[str, Sink], fx.Node] = {}
        self.gates: dict[tuple[str, Sink], str] = {}
        self.refits: dict[Sink, LayerStatistics] = {}
        # Contests that a unit which went must not win, and the tensors that say so.
        self.closed: dict[str, list[tuple[str, Contest]]] = {}
        self.first: dict[str, list[fx.Node]] = {}
        for group in groups:
            self.first[group.name] = self._close(group, twins)
            for i, sink in enumerate(group.gates):
                node = twins[sink.node.name]
                one = statistics.get(sink.node.name)
                if one is not None and one.layer.weight not in shared:
                    self.refits[sink] = one
                    self.reads[group.name, sink] = node
                    continue
                own = Sink(node, sink.argument, sink.dim, sink.axis)
                name = f"tilecut_gate_{len(self.gates)}_{i}"
                value = own.source.meta["val"]
                ones = torch.ones(int(sink.axis.root.size)).reshape(along(sink.dim, value.ndim))
                times = multiply_at(self.graph, own, self.graph.add_tensor(name, ones))
                # A later group at the same sink multiplies the product.
                times.meta["val"] = value
                self.gates[group.name, sink] = name
                self.reads[group.name, sink] = times
            self.first[group.name] += [self.reads[group.name, sink] for sink in group.gates]
        self.graph.module.recompile()

    def _close(self, group: Group, twins: Mapping[str, fx.Node]) -> list[fx.Node]:
        """Calls that close the group's contests to the units that a trial takes out: none yet."""
        held = self.closed[group.name] = []
        calls = []
        for contest in group.contests:
            name = f"tilecut_closed_{len(self.closed)}_{len(held)}"
            nobody = torch.zeros(int(contest.axis.root.size), dtype=torch.bool)
            calls.append(close_contest(self.graph, contest, twins[contest.node.name], name, nobody))
            held.append((name, contest))
        return calls

    def cut(self, group: Group, kept: Tensor) -> _Cut:
        """While entered, the group has only the units that `kept` [size] says True for."""
        changes: dict[str, Tensor] = {}
        for sink in group.gates:
            stays = torch.cat([kept, torch.tensor([True])])[unit_of(sink.axis, group.axis)]
            if (group.name, sink) in self.gates:
                name = self.gates[group.name, sink]
                held = self.graph.tensor(name)
                changes[name] = stays.to(held.dtype).reshape(held.shape)
            else:
                changes |= _refitted(self.graph, self.refits[sink], stays)
        for name, contest in self.closed[group.name]:
            stays = torch.cat([kept, torch.tensor([True])])[unit_of(contest.axis, group.axis)]
            changes[name] = (~stays).reshape(self.graph.tensor(name).shape)
        return _Cut(self.graph, changes)


@dataclass
class _Cut:
    """Tensors of a graph replaced while entered."""

    graph: Graph
    changes: Mapping[str, Tensor]

    def __enter__(self) -> None:
        self.before = {name: self.graph.tensor(name) for name in self.changes}
        for name, value in self.changes.items():
            self.graph.set_tensor(name, nn.Parameter(value, requires_grad=False))

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            self.graph.set_tensor(name, value)


def _refitted(graph: Graph, one: LayerStatistics, stays: Tensor) -> dict[str, Tensor]:
    """The layer's weight, zero where inputs went, and bias, so that its output on dense activations changes least."""
    layer = one.layer
    weight = layer.matrix(graph)
    full = torch.cat([weight.double(), layer.offset(graph).double()[:, None]], 1).T.cpu()
    columns = torch.cat([stays, torch.tensor([True])]).nonzero()[:, 0]
    gram = one.gram[columns][:, columns]
    try:
        factor = RidgeFactor(gram, RIDGE * float(gram.diagonal()[:-1].mean()), with_bias=layer.bias is not None)
    except ArithmeticError as e:
        raise CalibrationError("score", f"{layer.weight} cannot be refitted ({e})", fix="give other calibration data") from e
    # What the missing inputs added is to be made up for by the others: X^T T over the rows that stay.
    solved = factor.improve(full[columns], one.gram[columns] @ full)
    new = torch.zeros_like(weight)
    new[:, columns[:-1]] = solved[:-1].T.to(weight.dtype).to(weight.device)
    held = graph.tensor(layer.weight)
    changed = {layer.weight: (new.T if layer.transposed else new).reshape(held.shape).contiguous()}
    if layer.bias is not None:
        changed[layer.bias] = solved[-1].to(weight.dtype).to(weight.device)
    return changed


def _shared_weights(graph: Graph) -> set[str]:
    """Names of the weights and biases that more than one call reads."""
    reads: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            reads.setdefault(str(node.target), set()).update(node.users)
    shared = {name for name, users in reads.items() if len(users) > 1}
    for node in graph.nodes:
        layer = dense_layer(node)
        if layer is not None and layer.bias in shared:
            shared.add(layer.weight)
    return shared


class _Replay:
    """One batch, run up to a node once and from there on as often as asked."""

    def __init__(self, schedule: Schedule, batch: Batch, start: int):
        self.batch, self.stepper = batch, Stepper(schedule, batch)
        if start:
            self.stepper.run_to(schedule.nodes[start - 1].name, inclusive=True)
        self.saved = (self.stepper.at, dict(self.stepper.values), dict(self.stepper.real))

    def outputs(self, names: set[str]) -> dict[str, Tensor]:
        """The named outputs that come after the saved node, with the tensors that the graph has now."""
        stepper = self.stepper
        at, values, real = self.saved
        stepper.at, stepper.values, stepper.real = at, dict(values), dict(real)
        graph, position = stepper.graph, stepper.schedule.position
        wanted = [(name, node) for name, node in zip(graph.outputs, graph.results, strict=True) if name in names]
        found = {}
        # Each is taken as soon as it is there: the stepper keeps only what later nodes read.
        for name, node in sorted(wanted, key=lambda pair: position.get(pair[1].name, -1)):
            if position.get(node.name, -1) >= at:
                if position[node.name] >= stepper.at:
                    stepper.run_to(node.name, inclusive=True)
                found[name] = stepper.read(node)
        return found
