"""Run a graph and hand out what its sinks contract: y = sum over k of the terms that index k of the sink adds.

Every op that contracts is brought to one form (`Terms`), so that a statistic of units is written once:

    linear, inner, matmul, mm, bmm, addmm, baddbmm, mv, dot   x [n, K] by a weight [K, N]
    batched matmul by weights, grouped_matmul                 the same for every matrix of the batch, or expert: x holds
                                                              the rows that this one multiplies
    convolution                                               x [n, K] at every place; N are the outputs and the window
    matmul of two activations, sum                            the terms themselves, [n, K, F]: their product, or what
                                                              is summed; F are the static dimensions that stay
    anything else                                             the activation itself, [n, K, 1]

n counts positions. Padded ones are left out (`Batch.rows`), also where rows were picked by an index before (tokens
routed to experts).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.axes.expert_rows import GROUPED, ExpertRows
from tilecut_passes.axes.infer import Sink, infer
from tilecut_passes.axes.rules_convolutions import CONVOLUTIONS, is_transposed
from tilecut_passes.axes.rules_reductions import SUMS
from tilecut_passes.calibration import Batch
from tilecut_passes.check_finite import check_values
from tilecut_passes.graph import Graph, arguments, is_call, map_nodes, source, value_of
from tilecut_passes.share_batches import own_share

aten = torch.ops.aten
LINEARS = (aten.linear.default, aten.inner.default)
MATMULS = (
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.addmv.default,
    aten.dot.default,
    aten.vdot.default,
)
# Elements of a product of activations that are held at once.
CHUNK = 2**24


@dataclass(frozen=True)
class Terms:
    """What one matrix of a sink contracts in one batch.

    Attributes:
        x: [n, K], to be multiplied by `weight` [K, N]; or, where that is None, the terms themselves, [n, K, F].
        matrix, matrices: which of how many matrices the sink has; rows of one are not rows of another.
    """

    x: Tensor
    weight: Tensor | None
    matrix: int = 0
    matrices: int = 1


Visit = Callable[[Sink, Terms], None]


def read_contractions(
    graph: Graph, sinks: Iterable[Sink], batches: Sequence[Batch], progress: Callable[[int, int], None], visit: Visit
) -> bool:
    """Call `visit` for what every sink contracts in this process's batches; whether it has any.

    A process without a share reads the first batch, to know the shapes, and is told that nothing of it counts.

    Raises:
        CalibrationError: an activation is not finite; names the layer.
    """
    own = own_share(batches)
    wanted: dict[str, list[Sink]] = {}
    for sink in sinks:
        known = wanted.setdefault(sink.node.name, [])
        if all((s.argument, s.dim) != (sink.argument, sink.dim) for s in known):
            known.append(sink)
    weights = {n.name for n in infer(graph).weights}
    for done, (_, batch) in enumerate(own or [(0, batches[0])]):
        reader = _Reader(graph, batch, wanted, weights, visit)
        with torch.no_grad():
            reader.run(*(batch.inputs[name] for name in graph.inputs))
        progress(done + 1, max(len(own), 1))
    return bool(own)


def read_expert_rows(
    graph: Graph, wanted: Sequence[ExpertRows], batches: Sequence[Batch], visit: Callable[[int, Tensor, Tensor], None]
) -> bool:
    """Call `visit` with each one's number, rows [n, ..] and their experts [n]; whether this process has batches.

    Padded positions are left out, as by `read_contractions`.
    """
    own = own_share(batches)
    weights = {n.name for n in infer(graph).weights}
    for _, batch in own or [(0, batches[0])]:
        reader = _RowReader(graph, batch, {}, weights, lambda sink, terms: None)
        reader.rows, reader.added = wanted, visit
        with torch.no_grad():
            reader.run(*(batch.inputs[name] for name in graph.inputs))
    return bool(own)


class _Reader(fx.Interpreter):
    """Runs a graph on one batch and visits its sinks."""

    def __init__(self, graph: Graph, batch: Batch, wanted: dict[str, list[Sink]], weights: set[str], visit: Visit):
        super().__init__(graph.module)
        self.source, self.batch, self.wanted, self.weights, self.visit = graph, batch, wanted, weights, visit
        # By node: which rows of its result are real, where they were picked by an index.
        self.picked: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        for sink in self.wanted.get(n.name, ()):
            for terms in self._terms(n, sink):
                check_values(self.source, self.batch.inputs, {n.name: terms.x})
                self.visit(sink, terms)
        picked = self._picked(n)
        result = super().run_node(n)
        if picked is not None and isinstance(result, Tensor) and result.ndim and len(result) != len(picked):
            picked = None
        if picked is not None:
            self.picked[n] = picked
        return result

    def _picked(self, n: fx.Node) -> Tensor | None:
        """Which rows of a result are real, if an index picked its rows or those of an operand."""
        if self.batch.mask is None or n.op != "call_function":
            return None
        if is_call(n, aten.index.Tensor, aten.index_select.default):
            index = n.args[1] if is_call(n, aten.index.Tensor) else [n.args[2]] if n.args[1] == 0 else []
            if isinstance(index, Sequence) and len(index) == 1 and isinstance(index[0], fx.Node):
                read = source(n)
                real = self.picked.get(read)
                real = self.batch.valid(self.env[read]) if real is None else real
                return real[self.env[index[0]]] if real is not None else None
            return None
        if is_call(n, aten.permute.default, aten.transpose.int, aten.t.default):
            return None
        return next((self.picked[x] for x in n.all_input_nodes if x in self.picked), None)

    def _terms(self, n: fx.Node, sink: Sink) -> Iterator[Terms]:
        args, _ = map_nodes(lambda x: self.env[x], n.args, n.kwargs)
        x = args[sink.argument]
        if is_call(n, *LINEARS):
            w = args[1]
            yield Terms(self._rows(x, sink.argument, n), w.reshape(-1, w.shape[-1]).T)
        elif is_call(n, *MATMULS):
            yield from self._matmul(n, sink.argument, x, args[sink.argument + 1])
        elif is_call(n, *GROUPED) and args[1].ndim == 3:
            bounds = [0, *args[2].tolist()]
            real = self.picked.get(source(n))
            for e, (low, high) in enumerate(itertools.pairwise(bounds)):
                rows = x[low:high] if real is None else x[low:high][real[low:high]]
                yield Terms(rows, args[1][e], e, len(bounds) - 1)
        elif is_call(n, *CONVOLUTIONS):
            yield Terms(self._rows(x.movedim(sink.dim, -1)), _by_channel(n, args[1], x.shape[sink.dim]))
        elif sink.axis.root.size == 1:
            # A branch that is added to its stream: one unit at every position.
            yield Terms(self._rows(x, sink.argument, n)[:, None], None)
        elif is_call(n, *SUMS):
            yield Terms(self._summed(n, x, sink.dim), None)
        else:
            yield Terms(self._rows(x.movedim(sink.dim, -1), sink.argument, n)[..., None], None)

    def _matmul(self, n: fx.Node, first: int, x: Tensor, w: Tensor) -> Iterator[Terms]:
        left, right = (source(n, first + i).name in self.weights for i in (0, 1))
        x = x if x.ndim > 1 else x[None]
        w = w if w.ndim > 1 else w[:, None]
        if left and not right:
            x, w = w.transpose(-1, -2), x.transpose(-1, -2)
        while w.ndim > 2 and w.shape[0] == 1:
            w = w[0]
        if (left or right) and w.ndim == 2:
            yield Terms(self._rows(x, first, n), w)
            return
        w = w[None] if w.ndim == 2 else w
        batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
        x = x.expand(*batch, *x.shape[-2:])
        if left or right:
            own = batch[len(batch) - (w.ndim - 2) :]
            matrices = w.expand(*own, *w.shape[-2:]).reshape(-1, *w.shape[-2:])
            x = x.reshape(*batch[: len(batch) - len(own)], -1, *x.shape[-2:])
            for e, matrix in enumerate(matrices):
                yield Terms(self._rows(x[..., e, :, :]), matrix, e, len(matrices))
            return
        w = w.expand(*batch, *w.shape[-2:])
        real = self.batch.valid(x)
        x, w = (x[real], w[real]) if real is not None else (x, w)
        x, w = x.reshape(-1, *x.shape[-2:]), w.reshape(-1, *w.shape[-2:])
        # What has no fixed size counts positions, not features.
        static = isinstance(value_of(n).shape[-1], int)
        step = max(CHUNK // max(x.shape[1] * w.shape[1] * w.shape[2], 1), 1)
        for one, other in zip(x.split(step), w.split(step)):
            terms = (one[..., None] * other[:, None]).flatten(0, 1)
            yield Terms(terms if static else terms.transpose(1, 2).reshape(-1, terms.shape[1], 1), None)

    def _summed(self, n: fx.Node, x: Tensor, dim: int) -> Tensor:
        sizes = value_of(source(n)).shape
        others = [d for d in range(x.ndim) if d != dim]
        places = [d for d in others if not isinstance(sizes[d], int)] or others[:-1]
        features = [d for d in others if d not in places]
        x = x.permute(*places, dim, *features)
        count = len(places)
        real = self.batch.valid(x)
        if real is not None and real.ndim <= count:
            x, count = x[real], count - real.ndim + 1
        return x.reshape(math.prod(x.shape[:count]), x.shape[count], -1)

    def _rows(self, x: Tensor, argument: int = 0, n: fx.Node | None = None) -> Tensor:
        """The real positions of an activation, which `n` reads, as rows; its last dimension is what is contracted."""
        real = self.picked.get(source(n, argument)) if n is not None else None
        if real is not None and len(real) == len(x):
            return x[real].reshape(-1, x.shape[-1])
        # einsum makes bmm of [1, positions, K].
        while x.ndim > 2 and x.shape[0] == 1 and self.batch.valid(x) is None:
            x = x[0]
        return self.batch.rows(x)


class _RowReader(_Reader):
    """Runs a graph on one batch and visits what experts add."""

    rows: Sequence[ExpertRows]
    added: Callable[[int, Tensor, Tensor], None]

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.ends: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for i, one in enumerate(self.rows):
            if one.ends.name == n.name:
                self.ends[n.name] = result
            elif one.node.name == n.name:
                check_values(self.source, self.batch.inputs, {n.name: result})
                ends = self.ends[one.ends.name]
                places = torch.arange(len(result), dtype=ends.dtype, device=ends.device)
                expert = torch.searchsorted(ends, places, right=True)
                real = self.picked.get(n)
                self.added(i, *((result, expert) if real is None else (result[real], expert[real])))
        return result


def _by_channel(node: fx.Node, weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight as [input channel, outputs times the window]; 0 for outputs of another group."""
    a = arguments(node)
    groups = a["groups"]
    if is_transposed(node, a):
        held = weight.reshape(groups, channels // groups, -1)
    else:
        out, width = weight.shape[:2]
        held = weight.reshape(groups, out // groups, width, -1).transpose(1, 2).reshape(groups, width, -1)
    return torch.block_diag(*held) if groups > 1 else held[0]
