"""Refit the weights after a cut in closed form, so that the pruned model follows the dense one's trajectory.

Before: a pruned graph made from `dense` (node names agree). After: every layer that lost inputs, or whose inputs
changed because an earlier one did, has the weights and bias that solve, over the calibration data,

    min_W,b  || X W^T + b - T ||^2 + lambda || W - W0 ||^2,      T = Y_dense - (r_pruned - r_dense)

where X are the inputs that the pruned layer now sees (everything before it already refitted), Y_dense the dense
layer's output at the units that stay, r what the output is added to (the residual stream), and W0 the sliced weights.
Layers are dense layers, convolutions (groups of channels apart) and experts (each over the rows that the dense model
sends to it). Left alone: layers before the first cut, and those that `refit_sites.py` names a reason for.

Layers are solved in graph order; dense and pruned run side by side, batch after batch, from one layer to the next.
Held are the normal equations of one layer in float64, and of every batch what later layers still read: in memory up to
1 GB in all, beyond that (or from the beginning with `offload`) in files. So memory does not grow with the calibration
data, and where the weights are mapped files too (`load_model`), it does not grow with the model.

A second run starts from refitted weights and moves them on a little, since lambda holds each run to where it starts.

Least-squares refit after structured removal: He et al., Channel Pruning, arXiv 1707.06168; the residual correction
makes later branches repair what earlier ones lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tilecut_passes.axes.selection import take
from tilecut_passes.calibration import Batch
from tilecut_passes.check_finite import check_weights
from tilecut_passes.dense_layer import DenseLayer
from tilecut_passes.disk_tensor import DiskTensors, WaitingTensors
from tilecut_passes.expert_layer import ExpertLayer
from tilecut_passes.graph import Graph, Refusal, source
from tilecut_passes.plan import PrunePlan
from tilecut_passes.refit_sites import Kept, RefitLayer, Site, blocks_of, find_changed, find_sites
from tilecut_passes.share_batches import own_share
from tilecut_passes.solve_layer import NormalEquations, solve
from tilecut_passes.step_graph import Schedule, find_choices
from tilecut_passes.twin_run import TwinRun
from tilecut_runtime.errors import CalibrationError

# Of the equations of many matrices (experts), so many are summed at once; for others the batches are read again.
EQUATIONS_BYTES = 1 << 30


@dataclass(frozen=True)
class Reconstruct:
    """Solve every layer whose inputs were cut or changed.

    Args:
        dense: the graph that the pruned one was made from.
        batches: calibration batches.
        plan: what it was cut by; without it, layers that lost outputs are left alone.
        ridge: lambda, relative to the mean diagonal of X^T X.
        offload: folder for activations and new weights; None keeps them in memory as long as they are small.
    """

    dense: Graph
    batches: Sequence[Batch]
    plan: PrunePlan | None = None
    ridge: float = 3e-2
    offload: Path | None = None
    progress: Callable[[int, int], None] = field(default=lambda done, of: None, compare=False)

    def __call__(self, graph: Graph) -> int:
        """Refit in place; returns the number of layers solved.

        Raises:
            CalibrationError: a weight or an activation is not finite, or a layer cannot be solved; names the tensor.
        """
        plan = Kept.of(self.dense, self.plan) if self.plan is not None else None
        changed, narrowed = find_changed(self.dense, graph, plan)
        sites, refusals = find_sites(self.dense, graph, plan, changed, narrowed)
        graph.refusals += refusals
        rerouted = plan.rerouted() if plan is not None else set()
        follow = find_choices(graph, changed) - rerouted
        schedules = Schedule(self.dense, follow), Schedule(graph, follow)
        runs = [TwinRun(*schedules, batch) for _, batch in own_share(self.batches)]
        disk = DiskTensors(self.offload) if self.offload is not None else None
        waiting = WaitingTensors(disk, limit=0) if disk else WaitingTensors()
        done = 0
        with torch.no_grad():
            for block in blocks_of(sites, graph):
                graph.refusals += _Refit(self.dense, graph, block, self.ridge).over(runs, waiting, disk or (lambda t: t))
                done += len(block)
                self.progress(done, len(sites))
        return len(sites)


class _Refit:
    """One block of sites: dense layers that multiply the same rows, or any one layer."""

    def __init__(self, dense: Graph, graph: Graph, block: Sequence[Site], ridge: float):
        self.dense, self.graph, self.block, self.ridge = dense, graph, block, ridge
        self.first = block[0]
        matrices = self._matrices(self.first)
        self.parts, outputs, self.inputs = matrices.shape
        # X^T (X_dense W^T) = (X^T X_dense) W^T: where a block has more outputs than inputs, and no residual, these are
        # fewer numbers, and the dense layer need not run.
        self.through_inputs = False
        if isinstance(self.first.layer, DenseLayer) and not self.first.residuals:
            inputs = self.first.layer.matrix(dense).shape[1]
            self.through_inputs = len(block) > 1 or outputs > inputs
            outputs = inputs if self.through_inputs else outputs
        self.columns = outputs

    def _matrices(self, site: Site) -> Tensor:
        return site.layer.matrices(self.graph.tensor(site.layer.weight).detach())

    def over(self, runs: Sequence[TwinRun], waiting: WaitingTensors, keep: Callable[[Tensor], Tensor]) -> list[Refusal]:
        """Sum over the batches, solve, and put the new tensors where `keep` says; returns what was left alone."""
        owned = {t.untyped_storage().data_ptr() for g in (self.dense, self.graph) for t in g.tensors.values()}
        tensors: list[_NewTensors] = []
        at_once = max(1, EQUATIONS_BYTES // (8 * (self.inputs + 1) * (self.inputs + 1 + self.columns)))
        starved = []
        for low in range(0, self.parts, at_once):
            parts = range(low, min(low + at_once, self.parts))
            equations = {part: NormalEquations(self.inputs, self.columns) for part in parts}
            for run in runs:
                run.run_to(self.first.node, inclusive=not self.through_inputs)
                node, target = run.pruned.node(self.first.node), self._target(run)
                for part, x, y in self.first.layer.rows(node, run.pruned, target):
                    if part in equations:
                        equations[part].add(x, y)
                run.wait(waiting, owned)
            # Not before: they need not be in memory beside the activations.
            tensors = tensors or [_NewTensors(self.graph, site.layer) for site in self.block]
            for part in parts:
                starved += [] if self._solve(part, equations.pop(part), tensors) else [part]
        for one in tensors:
            one.put(keep)
        if not starved:
            return []
        what = "experts" if isinstance(self.first.layer, ExpertLayer) else "channel groups"
        shown = ", ".join(map(str, starved[:8])) + (", .." if len(starved) > 8 else "")
        why = f"{what} {shown} of {self.parts} saw fewer rows than they have inputs ({self.inputs}): left as they are"
        return [Refusal("Reconstruct", self.first.node, why)]

    def _target(self, run: TwinRun) -> Tensor:
        """The dense layer's output, less what the residual stream has moved by; or its input, where that is enough."""
        site, node = self.first, run.dense.node(self.first.node)
        if self.through_inputs:
            assert isinstance(site.layer, DenseLayer)
            return run.dense.read(source(node, site.layer.x))
        return run.target(site)

    def _solve(self, part: int, equations: NormalEquations, tensors: list[_NewTensors]) -> bool:
        """Solve one part of every site; returns whether it had the rows for it."""
        equations.share()
        if not equations.is_finite():
            self._blame("activations")
        if self.parts > 1 and equations.rows < self.inputs:
            return False
        if (padding := self.first.padded_inputs(part, self.inputs)) is not None:
            equations.ignore(padding)
        sums = equations.gram[:, -1].clone()
        try:
            factor = equations.factor(self.ridge, with_bias=self.first.layer.bias is not None)
        except ArithmeticError as e:
            raise CalibrationError(
                "reconstruct",
                f"{self.first.layer.weight} cannot be solved for: {e}",
                fix="give more calibration data, or a larger ridge",
            ) from e
        for site, new in zip(self.block, tensors, strict=True):
            matrix, offset = new.part(part)
            solve(factor, matrix, offset, self._cross(site, equations.cross, sums))
            if not matrix.isfinite().all():
                self._blame("solved weights")
        return True

    def _cross(self, site: Site, cross: Tensor, sums: Tensor) -> Callable[[slice], Tensor]:
        """X^T T for a slice of a site's outputs."""
        if not self.through_inputs:
            return lambda here: cross[:, here]
        assert isinstance(site.layer, DenseLayer)
        matrix, offset = site.layer.matrix(self.dense), site.layer.offset(self.dense)

        def through(here: slice) -> Tensor:
            weight, bias = matrix[here], offset[here]
            if site.outputs is not None:
                weight, bias = take(matrix, 0, site.outputs[here]), take(offset, 0, site.outputs[here])
            return cross @ weight.double().T.cpu() + sums[:, None] * bias.double().cpu()

        return through

    def _blame(self, what: str) -> None:
        """Raise for what is not finite."""
        check_weights(self.dense, "reconstruct")
        check_weights(self.graph, "reconstruct")
        raise CalibrationError(
            "reconstruct",
            f"{what} at {self.first.layer.weight} are not finite",
            fix="look for NaN or infinity in the calibration data, and for weights of extreme size",
        )


class _NewTensors:
    """The tensors of a layer while its parts are solved, one after another."""

    def __init__(self, graph: Graph, layer: RefitLayer):
        self.graph, self.layer = graph, layer
        self.held = [graph.tensor(name).detach() for name in (layer.weight, layer.bias) if name is not None]
        self.new = [torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t) for t in self.held]

    def part(self, part: int) -> tuple[Tensor, Tensor | None]:
        """Matrix [O, I] and offset [O] of a part, as views of the new tensors: W0 before it is solved."""
        matrices = self.layer.matrices(self.new[0])
        outputs = matrices.shape[1]
        return matrices[part], self.new[1][part * outputs : (part + 1) * outputs] if len(self.new) > 1 else None

    def put(self, keep: Callable[[Tensor], Tensor]) -> None:
        """Put the new tensors into the graph."""
        names = [name for name in (self.layer.weight, self.layer.bias) if name is not None]
        for name, tensor in zip(names, self.new, strict=True):
            self.graph.set_tensor(name, nn.Parameter(keep(tensor), self.graph.tensor(name).requires_grad))
