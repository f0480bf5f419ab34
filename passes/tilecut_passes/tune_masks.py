"""Mask tuning: the masks of the units that stay become numbers, fitted layer by layer to the dense model's outputs.

Before: a pruned graph made from `dense` by `plan` (node names agree). After: the weights behind every gate of heads, KV
groups, queries and neurons are scaled, a number s_u for every unit u of the layer, so that over the calibration data

    min_s  || sum_u s_u A_u + b - T ||^2 + damp^2 || s - 1 ||^2 ,      A_u = X_u W_u^T,   T = Y_dense - (r_pruned - r_dense)

where X_u and W_u are the inputs and the weight columns of unit u (a head has several), and T is what the pruned layer
should give: the dense layer's output less what the residual stream has moved by. Layers are solved from input to output,
each with what the tuned layers before it give. The normal equations

    G_uv = <A_u, A_v> = sum over the columns of u and v of (X^T X) * (W^T W)

are summed over batches in float64. A soft mask is exact in the weights: nothing is left of it in the graph.

Where a scale's magnitude passes `largest`, that layer and all later ones keep masks of 1, and the refusals say so. Left
alone as well: layers before the first cut (their solution is 1), and layers that `refit_sites.py` has a reason against,
such as weights that several calls share.

Kwon et al., A Fast Post-Training Pruning Framework for Transformers, arXiv 2204.09656, section 4.3, who solve for s - 1
by LSMR with damp 1 and bound scales by 10. Here the same minimum is found in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tilecut_passes.axes.groups import Group, find_groups
from tilecut_passes.axes.selection import PAD
from tilecut_passes.calibration import Batch
from tilecut_passes.check_finite import FIX, check_weights
from tilecut_passes.convolution_layer import ConvolutionLayer
from tilecut_passes.dense_layer import DenseLayer
from tilecut_passes.disk_tensor import DiskTensors, WaitingTensors
from tilecut_passes.graph import Graph, Refusal, source
from tilecut_passes.mask import unit_of
from tilecut_passes.plan import PrunePlan
from tilecut_passes.refit_sites import Kept, RefitLayer, Site, find_changed, find_sites
from tilecut_passes.share_batches import own_share, total
from tilecut_passes.step_graph import Schedule, find_choices
from tilecut_passes.twin_run import TwinRun
from tilecut_runtime.errors import CalibrationError

KINDS = ("heads", "kv_groups", "queries", "neurons")
# Rounding of X^T X, in units in the last place of its diagonal: what lies below is not told from zero.
ROUNDING = 64


@dataclass(frozen=True)
class TuneMasks:
    """Scale the units that a plan keeps.

    Args:
        dense: the graph that the pruned one was made from.
        batches: calibration batches.
        plan: what it was cut by.
        damp: how strongly scales are held to 1.
        largest: the magnitude of a scale at which tuning ends.
        offload: folder for activations; None keeps them in memory as long as they are small.
    """

    dense: Graph
    batches: Sequence[Batch]
    plan: PrunePlan
    damp: float = 1.0
    largest: float = 10.0
    offload: Path | None = None
    progress: Callable[[int, int], None] = field(default=lambda done, of: None, compare=False)

    def __call__(self, graph: Graph) -> int:
        """Tune in place; returns the number of layers tuned.

        Raises:
            CalibrationError: a weight or an activation is not finite; names the tensor.
        """
        kept = Kept.of(self.dense, self.plan)
        changed, narrowed = find_changed(self.dense, graph, kept)
        sites, refusals = find_sites(self.dense, graph, kept, changed, narrowed)
        masked = self._masked(kept)
        sites = [s for s in sites if s.node in masked]
        graph.refusals += [Refusal("TuneMasks", r.node, r.why) for r in refusals if r.node in masked]
        follow = find_choices(graph, changed) - kept.rerouted()
        schedules = Schedule(self.dense, follow), Schedule(graph, follow)
        runs = [TwinRun(*schedules, batch) for _, batch in own_share(self.batches)]
        waiting = WaitingTensors(DiskTensors(self.offload), limit=0) if self.offload else WaitingTensors()
        with torch.no_grad():
            for done, site in enumerate(sites):
                units = find_units(site, graph, masked[site.node], kept)
                scales = self._solve(graph, site, units, runs, waiting)
                if (worst := float(scales.abs().max())) > self.largest:
                    why = f"a scale of {worst:.3g} at {site.layer.weight} passes {self.largest:g}: tuning ends there"
                    graph.refusals += [Refusal("TuneMasks", s.node, why) for s in sites[done:]]
                    return done
                fold_scales(graph, site.layer, units.spread(scales))
                self.progress(done + 1, len(sites))
        return len(sites)

    def _masked(self, kept: Kept) -> dict[str, list[Group]]:
        """By name, the calls that contract units of masked groups."""
        planned = {g.name for g in self.plan.groups if g.kind in KINDS}
        found: dict[str, list[Group]] = {}
        for group in find_groups(kept.axes):
            for sink in group.gates if group.name in planned else ():
                found.setdefault(sink.node.name, []).append(group)
        return found

    def _solve(
        self, graph: Graph, site: Site, units: Units, runs: Sequence[TwinRun], waiting: WaitingTensors
    ) -> Tensor:
        """The scale of every unit."""
        owned = {t.untyped_storage().data_ptr() for g in (self.dense, graph) for t in g.tensors.values()}
        equations = MaskEquations(graph, site.layer, units)
        for run in runs:
            run.run_to(site.node, inclusive=True)
            for part, x, target in site.layer.rows(run.pruned.node(site.node), run.pruned, run.target(site)):
                equations.add(part, x, target)
            run.wait(waiting, owned)
        scales = equations.solve(self.damp)
        if not scales.isfinite().all():
            check_weights(self.dense, "tune")
            check_weights(graph, "tune")
            raise CalibrationError("tune", f"activations at {site.layer.weight} are not finite", fix=FIX)
        return scales


@dataclass(frozen=True)
class Units:
    """Which unit every column of a layer's matrices [P, O, I] belongs to: `of` [P, I], `count` where it is none."""

    of: Tensor
    count: int

    def spread(self, scales: Tensor) -> Tensor:
        """A number per unit as one per column; 1 for columns of no unit."""
        return torch.cat([scales, scales.new_ones(1)])[self.of]


def find_units(site: Site, graph: Graph, groups: Sequence[Group], kept: Kept) -> Units:
    """The units of a layer: what differs in any of `groups` is another one, so a query head of a KV group is one."""
    twin = next(n for n in kept.axes.graph.nodes if n.name == site.node)
    x = source(twin, site.layer.x) if isinstance(site.layer, DenseLayer) else source(twin)
    axis = kept.axes.of[x][site.channel]
    old = kept.selection.indices(axis)
    owners = torch.stack([unit_of(axis, g.axis)[old.clamp_min(0)] for g in groups], 1)
    is_unit = (old != PAD) & (owners < torch.tensor([g.size for g in groups])).any(1)
    found, which = owners[is_unit].unique(dim=0, return_inverse=True)
    of = torch.full((len(old),), len(found))
    of[is_unit] = which
    parts, _, width = site.layer.matrices(graph.tensor(site.layer.weight).detach()).shape
    if isinstance(site.layer, ConvolutionLayer):
        # [P * I] channels, each read by every place of a window.
        of = of.view(parts, -1)
        return Units(of.repeat_interleave(width // of.shape[1], 1), len(found))
    return Units(of.expand(parts, -1), len(found))


class MaskEquations:
    """G and A^T (T - Y) of one layer, Y what it gives with masks of 1: streamed over rows, float64, memory [U, U]."""

    def __init__(self, graph: Graph, layer: RefitLayer, units: Units):
        self.matrices = layer.matrices(graph.tensor(layer.weight).detach())
        self.offsets = None if layer.bias is None else graph.tensor(layer.bias).detach().view(len(self.matrices), -1)
        # One batch's products are in float32, unless the model is in float64; sums are in float64.
        self.dtype = torch.promote_types(self.matrices.dtype, torch.float32)
        self.units = units
        self.gram = torch.zeros(units.count + 1, units.count + 1, dtype=torch.float64)
        self.missing = torch.zeros(units.count + 1, dtype=torch.float64)
        # Of one matrix it is computed once; those of many experts need not be held together.
        self.overlap = self._overlap(0) if len(self.matrices) == 1 else None

    def _overlap(self, part: int) -> Tensor:
        weight = self.matrices[part].double()
        return (weight.T @ weight).cpu()

    def add(self, part: int, x: Tensor, target: Tensor) -> None:
        """Rows x [N, I] of a part, and what it should give [N, O]."""
        x, weight = x.to(self.dtype), self.matrices[part].to(self.dtype)
        missing = target.to(self.dtype) - x @ weight.T
        if self.offsets is not None:
            missing = missing - self.offsets[part].to(self.dtype)
        of = self.units.of[part]
        overlap = self.overlap if self.overlap is not None else self._overlap(part)
        products = (x.T @ x).double().cpu() * overlap
        self.gram.index_add_(0, of, products.new_zeros(len(of), len(self.gram)).index_add_(1, of, products))
        self.missing.index_add_(0, of, ((x.T @ missing).double() * weight.T.double()).sum(1).cpu())

    def solve(self, damp: float) -> Tensor:
        """The scales [U]; not finite where a row was not."""
        gram, missing = total(self.gram)[:-1, :-1], total(self.missing)[:-1]
        penalty = damp**2 + ROUNDING * torch.finfo(self.dtype).eps * gram.diagonal()
        # A unit that is never on has nothing to divide by.
        penalty = penalty.clamp_min(torch.finfo(penalty.dtype).tiny)
        return 1 + torch.linalg.solve_ex(gram + torch.diag(penalty), missing).result


def fold_scales(graph: Graph, layer: RefitLayer, scales: Tensor) -> None:
    """Multiply the columns of a layer's matrices [P, O, I] by `scales` [P, I]: masks before it, exactly."""
    held = graph.tensor(layer.weight)
    new = held.detach().clone(memory_format=torch.contiguous_format)
    layer.matrices(new).mul_(scales[:, None].to(new.device, new.dtype))
    graph.set_tensor(layer.weight, nn.Parameter(new, held.requires_grad))
