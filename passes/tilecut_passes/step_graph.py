"""Run a graph node by node on one batch, stopping where asked; and a pruned graph beside the dense one that it is from.

Weights, and what is only another view of one, are read where they are used, so that a changed one is seen. What later
nodes still read is kept; between two stops it can wait on disk (`disk_tensor.py`).

A pruned run can follow the dense one's choices: for a call in `follow`, the dense run's result is taken. The rows of an
expert are then the same in both, one for one, although the residual stream that the router sees differs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.calibration import Batch
from tilecut_passes.disk_tensor import WaitingTensors
from tilecut_passes.graph import Graph, execute, is_call, map_nodes, source, value_of
from tilecut_passes.weight_view import is_matrix_transpose

aten = torch.ops.aten
# Choices among values: results that say which, beside how much.
CHOICES = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim)
# What takes a boolean tensor for a choice of rows.
SELECTS = (aten.index.Tensor, aten.index_put.default, aten.nonzero.default, aten.masked_select.default)


class Schedule:
    """What all runs of a graph share: the order of its nodes and when each result is read last."""

    def __init__(self, graph: Graph, follow: Collection[str] = ()):
        self.graph, self.follow = graph, frozenset(follow)
        self.nodes = [n for n in graph.nodes if n.op != "output"]
        self.by_name = {n.name: n for n in self.nodes}
        self.position = {n.name: i for i, n in enumerate(self.nodes)}
        self.inputs = dict(zip(graph.placeholders, graph.inputs, strict=True))
        self.views = {n for n in self.nodes if _is_weight_view(n)}
        self.reads = {n: self._reads(n) for n in self.nodes}
        self.last_use = {read: i for i, n in enumerate(self.nodes) for read in self.reads[n] if n not in self.views}

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """The results that a node needs when it runs."""
        return [n for x in node.all_input_nodes for n in (self._reads(x) if x in self.views else [x])]


class Stepper:
    """One run: a schedule on a batch. `read` and `valid` tell of nodes that have run and whose result is still read."""

    def __init__(self, schedule: Schedule, batch: Batch):
        self.schedule, self.graph, self.batch = schedule, schedule.graph, batch
        self.at = 0
        self.values: dict[fx.Node, Any] = {}
        # Which rows are no padding, where the batch cannot tell from the shape.
        self.real: dict[fx.Node, Tensor] = {}
        # Results that another run follows.
        self.choices: dict[str, Any] = {}

    def node(self, name: str) -> fx.Node:
        """The node called `name`."""
        return self.schedule.by_name[name]

    def read(self, node: fx.Node) -> Any:
        """A tensor of the graph as it is now, or the result of a call."""
        if node.op == "get_attr":
            return self.graph.tensor(str(node.target)).detach()
        return self._execute(node) if node in self.schedule.views else self.values[node]

    def valid(self, node: fx.Node) -> Tensor | None:
        """Bool over leading dimensions of a result: True where it is no padding; None where all of it is real."""
        return self.real[node] if node in self.real else self.batch.valid(self.read(node))

    def run_to(self, name: str, inclusive: bool, choices: Mapping[str, Any] | None = None) -> None:
        """Run up to the node called `name`, stopping before it unless inclusive; `choices` are of a run to follow."""
        stop = self.schedule.position[name] + (1 if inclusive else 0)
        self._forget(self.at)
        while self.at < stop:
            node = self.schedule.nodes[self.at]
            if node.op == "placeholder":
                self.values[node] = self.batch.inputs[self.schedule.inputs[node]]
            elif node.op == "call_function" and node not in self.schedule.views:
                follows = node.name in self.schedule.follow
                self.values[node] = choices[node.name] if follows and choices is not None else self._execute(node)
                if follows and choices is None:
                    self.choices[node.name] = self.values[node]
                self._mark_real(node)
            self.at += 1
            # The sources of the node at the stop are still read by the caller.
            if self.at < stop:
                self._forget(self.at, node)

    def wait(self, where: WaitingTensors, owned: Collection[int]) -> None:
        """Let what is kept wait, on disk where there is too much of it; storages in `owned` are kept by others anyway."""
        self._forget(self.at)
        held = [n for n, v in self.values.items() if isinstance(v, Tensor) and v.device.type == "cpu"]
        held = [n for n in held if self.values[n].untyped_storage().data_ptr() not in owned]
        self.values.update(zip(held, where.put(id(self), [self.values[n] for n in held]), strict=True))
        where.give_back()

    def _execute(self, node: fx.Node) -> Any:
        args, kwargs = map_nodes(self.read, node.args, node.kwargs)
        return execute(node, args, kwargs)

    def _forget(self, at: int, node: fx.Node | None = None) -> None:
        for held in list(self.values) if node is None else self.schedule.reads[node]:
            if self.schedule.last_use.get(held, -1) < at and held in self.values:
                del self.values[held]
                self.real.pop(held, None)

    def _mark_real(self, node: fx.Node) -> None:
        """Rows that were picked are real where what they were picked from is; calls on such rows keep their number."""
        value = self.values[node]
        if not isinstance(value, Tensor) or not value.ndim:
            return
        if is_call(node, aten.index.Tensor):
            real = self._picked(node)
        else:
            real = next((self.real[x] for x in node.all_input_nodes if x in self.real), None)
        if real is not None and len(real) == value.shape[0]:
            self.real[node] = real

    def _picked(self, node: fx.Node) -> Tensor | None:
        indices = node.args[1]
        assert isinstance(indices, list | tuple)
        if len(indices) != 1 or source(node) not in self.values or not isinstance(indices[0], fx.Node):
            return None
        real, chosen = self.valid(source(node)), self.read(indices[0])
        rows_match = real is not None and (chosen.shape == real.shape if chosen.dtype == torch.bool else real.ndim == 1)
        return real[chosen] if real is not None and rows_match and (chosen.dtype == torch.bool or chosen.ndim == 1) else None


def _is_weight_view(node: fx.Node) -> bool:
    """Whether a call is only another view of a weight."""
    return is_matrix_transpose(node) and (source(node).op == "get_attr" or _is_weight_view(source(node)))


def find_choices(graph: Graph, changed: Collection[fx.Node]) -> frozenset[str]:
    """Names of the calls among `changed` that choose: which expert a row goes to, which rows an expert takes.

    These are top-k, sort and maxima (values and indices), integers, and booleans that pick rows.
    """
    chosen = set()
    for node in graph.nodes:
        value = value_of(node)
        if node not in changed or node.op != "call_function":
            continue
        if is_call(node, *CHOICES):
            chosen.add(node.name)
        elif isinstance(value, Tensor):
            picks = value.dtype == torch.bool and any(is_call(user, *SELECTS) for user in node.users)
            counts = not (value.dtype == torch.bool or value.is_floating_point() or value.is_complex())
            if picks or counts:
                chosen.add(node.name)
    return frozenset(chosen)
