"""How far a pruned graph's outputs and hidden states are from the dense one's: what recovery makes smaller.

    logits         temperature^2 KL(dense || pruned) of the softmax over the last dimension (Hinton et al., 1503.02531)
    other floats   squared error of a row, relative to the dense row's square, or to the median row's where that is larger
    hidden states  the same, where a branch is added back to its residual stream, after the first cut

Outputs are averaged, and so are hidden states. Padded positions do not count. Left out: key-value caches, and outputs
and hidden states that the cut gave another shape.

A loss over a part of a batch's rows counts its positions against those of the whole batch, so that parts of a batch, on
whichever process, add up to the loss of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tilecut.recovery_config import Recovery
from tilecut_passes.align_labels import IGNORED, LOGITS
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph, is_call, sizes_of, value_of
from tilecut_passes.measure_loss import task_loss
from tilecut_passes.move_graph import move_graph
from tilecut_passes.refit_sites import find_layer
from tilecut_runtime.errors import CalibrationError

aten = torch.ops.aten
Cut = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
# Batches from which the magnitude of a row is taken.
MEASURED = 4
# Below this a logit is one of a word that went.
LEAST_LOGIT = -1e9


@dataclass
class Distillation:
    """A dense teacher and a pruned student, both on `device` and with tensors of their own.

    Attributes:
        student: the graph to train.
        compared: the outputs that count; `hidden`: the hidden states that count, by node.
    """

    teacher: Graph
    student: Graph
    config: Recovery
    device: torch.device
    cut: Cut
    compared: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    median: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(
        dense: Graph,
        pruned: Graph,
        config: Recovery,
        device: torch.device,
        batches: Sequence[Batch],
        cut: Cut = dict,
        outputs: Sequence[str] | None = None,
    ) -> Distillation:
        """Copies of both graphs that give their hidden states too; `outputs` are those that count, None: all.

        Raises:
            CalibrationError: no output can be compared.
        """
        hidden = residual_sums(dense, pruned) if config.hidden else []
        teacher, student = (_giving(move_graph(graph, device), hidden) for graph in (dense, pruned))
        made = Distillation(teacher, student, config, device, cut, hidden=hidden)
        made._measure(batches[:MEASURED], pruned.outputs if outputs is None else outputs)
        return made

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The student's trainable parameters that the loss can reach."""
        ends = dict(zip(self.student.outputs, self.student.results, strict=True))
        # A loss of labels reads outputs that are not compared, too.
        wanted = list(ends) if self.config.labels else [*self.compared, *map(_label, self.hidden)]
        seen: set[fx.Node] = set()
        front = [ends[name] for name in wanted]
        while front:
            node = front.pop()
            if node not in seen:
                seen.add(node)
                front += node.all_input_nodes
        read = {str(n.target) for n in seen if n.op == "get_attr"}
        return {
            name: t
            for name, t in self.student.tensors.items()
            if name in read and isinstance(t, torch.nn.Parameter) and t.requires_grad and t.is_floating_point()
        }

    def loss(self, part: Batch, whole: Batch, hidden: bool = True) -> Tensor:
        """The loss of `part`, some rows of the batch `whole`."""
        config = self.config
        given = _to({**self.cut(part.inputs)}, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            got = self.student.differentiable(given)
        by_label = config.labels is not None
        total = torch.zeros((), device=self.device)
        if not by_label or config.distillation > 0:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                want = self.cut(self.teacher.run(_to(part.inputs, self.device)))
            compared = [self._distance(name, want[name], got[name], part, whole) for name in self.compared]
            if compared:
                total = total + torch.stack(compared).mean()
            if hidden and self.hidden:
                states = [self._distance(n, want[n], got[n], part, whole) for n in map(_label, self.hidden)]
                total = total + config.hidden * torch.stack(states).mean()
        if by_label:
            total = config.distillation * total + (1 - config.distillation) * self._task(got, part, whole)
        return total

    def _task(self, got: Mapping[str, Tensor], part: Batch, whole: Batch) -> Tensor:
        counted, of = _labelled(part.labels), _labelled(whole.labels)
        if part.labels is None or counted == 0:
            # A mean over nothing is no number.
            return torch.zeros((), device=self.device)
        return task_loss(got, part.labels.to(self.device)) * (counted / of)

    def _distance(self, name: str, want: Tensor, got: Tensor, part: Batch, whole: Batch) -> Tensor:
        x, y = part.rows(want).float(), part.rows(got).float()
        count = _positions(want, part, whole)
        if name not in self.median:
            t = self.config.temperature
            # Words that went are the least number in both; divided or summed it must stay one.
            x, y = x.clamp_min(LEAST_LOGIT), y.clamp_min(LEAST_LOGIT)
            divergence = F.kl_div((y / t).log_softmax(-1), (x / t).log_softmax(-1), reduction="sum", log_target=True)
            return t * t * divergence / count
        return ((x - y).square().sum(-1) / x.square().sum(-1).clamp_min(self.median[name])).sum() / count

    def _measure(self, batches: Sequence[Batch], outputs: Sequence[str]) -> None:
        """Find what can be compared, and how large its rows are."""
        squares: dict[str, list[Tensor]] = {}
        differ: set[str] = set()
        logits = False
        for batch in batches:
            want = self.teacher.run(_to(batch.inputs, self.device))
            got = self.student.run(_to(self.cut(batch.inputs), self.device))
            for name, value in want.items():
                if value.shape != got[name].shape or not value.is_floating_point() or value.ndim == 0:
                    differ.add(name)
                else:
                    squares.setdefault(name, []).append(batch.rows(value).float().square().sum(-1))
                    logits = logits or _is_logits(name, value)
        caches = {*self.teacher.states.values()}
        for name, found in squares.items():
            if name in differ or name in caches:
                continue
            if name in outputs:
                self.compared.append(name)
            if name != LOGITS or not logits:
                self.median[name] = float(torch.cat(found).median().clamp_min(1e-12))
        self.hidden = [n for n in self.hidden if _label(n) in self.median]
        if not self.compared and self.config.labels is None:
            raise CalibrationError(
                "recover",
                "the pruned model has no floating output of the dense one's shape",
                got=", ".join(outputs),
                fix="train it on labels, with distillation=0",
            )


def residual_sums(dense: Graph, pruned: Graph) -> list[str]:
    """Nodes of both graphs, after the first cut, that add a branch with a weight to the tensor that it branched off."""
    twins = {n.name: n for n in dense.nodes}
    order = {node: i for i, node in enumerate(pruned.nodes)}
    held = dense.tensors
    moved: set[fx.Node] = set()
    out = []
    for node in pruned.nodes:
        changed = node.op == "get_attr" and (
            str(node.target) not in held or held[str(node.target)].shape != pruned.tensor(str(node.target)).shape
        )
        if changed or any(x in moved for x in node.all_input_nodes):
            moved.add(node)
        if node in moved and node.name in twins and _is_residual(node, order):
            same = sizes_of(value_of(node)) == sizes_of(value_of(twins[node.name]))
            if same and is_call(twins[node.name], aten.add.Tensor):
                out.append(node.name)
    return out


def _is_residual(node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    if not is_call(node, aten.add.Tensor) or len(node.all_input_nodes) != 2:
        return False
    first, second = sorted(node.all_input_nodes, key=lambda n: order[n])
    shapes = [sizes_of(value_of(x)) for x in (node, first, second) if isinstance(value_of(x), Tensor)]
    if len(shapes) != 3 or shapes.count(shapes[0]) != 3 or not value_of(node).is_floating_point():
        return False
    return _branches(second, first, order)


def _branches(end: fx.Node, start: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether a contraction of a weight lies between `start` and `end`."""
    seen, front = set(), [end]
    while front:
        node = front.pop()
        if node not in seen and order[node] > order[start]:
            seen.add(node)
            front += node.all_input_nodes
    reached = {start}
    weighted = False
    for node in sorted(seen, key=lambda n: order[n]):
        if any(x in reached for x in node.all_input_nodes):
            reached.add(node)
            weighted = weighted or find_layer(node) is not None
    return weighted and end in reached


def _giving(graph: Graph, hidden: Sequence[str]) -> Graph:
    """The graph with hidden states as further outputs, in place."""
    nodes = {n.name: n for n in graph.nodes}
    end = graph.fx.output_node()
    end.args = ((*graph.results, *(nodes[name] for name in hidden)),)
    graph.outputs = (*graph.outputs, *map(_label, hidden))
    graph.module.recompile()
    return graph


def _label(node: str) -> str:
    """A hidden state among the outputs: no output of a model has a blank in its name."""
    return f"hidden {node}"


def _is_logits(name: str, value: Tensor) -> bool:
    return name == LOGITS and value.ndim in (2, 3) and value.shape[-1] > 1


def _positions(value: Tensor, part: Batch, whole: Batch) -> float:
    """How many rows a value of `part` would have for the whole batch."""
    if part.valid(value) is not None:
        assert whole.mask is not None
        return float((whole.mask != 0).sum())
    rows = value.numel() // (value.shape[-1] if value.ndim > 1 else 1)
    return rows * _size(whole) / _size(part)


def _size(batch: Batch) -> int:
    return next(iter(batch.inputs.values())).shape[0]


def _labelled(labels: Tensor | None) -> int:
    if labels is None:
        return 0
    return labels.numel() if labels.is_floating_point() else int((labels != IGNORED).sum())


def _to(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
