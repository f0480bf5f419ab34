"""Which layers of a pruned graph are refitted, to what, and which are not and why.

A call is *changed* when it sums over units that were cut, or reads what a changed call made. Every changed layer is a
site: dense layers, convolutions, matrices of experts. Left alone, with a reason: weights that several calls share (they
have no one target, such as a head tied to the embeddings), and contractions of weights in any other spelling.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.branches import is_sum
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import Axes, infer
from tilecut_passes.axes.rules_convolutions import CONVOLUTIONS as ALL_CONVOLUTIONS
from tilecut_passes.axes.rules_convolutions import is_transposed
from tilecut_passes.axes.selection import PAD, Selection
from tilecut_passes.convolution_layer import ConvolutionLayer, convolution_layer
from tilecut_passes.dense_layer import DenseLayer, dense_layer
from tilecut_passes.expert_layer import SORTED, ExpertLayer, expert_layer
from tilecut_passes.graph import Graph, Refusal, arguments, is_call, source, value_of
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import kept
from tilecut_passes.step_graph import Stepper
from tilecut_passes.weight_view import read_weight

aten = torch.ops.aten


class RefitLayer(Protocol):
    """A call that multiplies rows by matrices: `matrices` [P, O, I] in a tensor, and an offset [P * O] or none."""

    @property
    def weight(self) -> str:
        """Name of the tensor that holds the matrices."""
        ...

    @property
    def bias(self) -> str | None:
        """Name of the tensor that holds the offsets."""
        ...

    def matrices(self, held: Tensor) -> Tensor:
        """What the tensor `weight` holds as [P, O, I], a view."""
        ...

    def rows(self, node: fx.Node, run: Stepper, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For some part of 0..P-1 each time: rows [N, I] that the call sees in `run`, and their targets [N, O]."""
        ...


@dataclass(frozen=True)
class Site:
    """A layer to refit.

    Args:
        node: name of its call in both graphs.
        residuals: nodes of the pruned graph that its output is added to and that are known before it runs.
        were: what stands in their places in the dense graph: another node where a branch between the two was removed.
        channel: the dimension of its input and output that holds units, counted from the end.
        outputs: the dense layer's outputs that stay (PAD: a new one of zeros); None: all.
        padding: bool over the inputs, True for those that the plan added; their weights stay zero. None: there are none.
    """

    node: str
    layer: RefitLayer
    residuals: tuple[str, ...]
    were: tuple[str, ...]
    channel: int
    outputs: Tensor | None = None
    padding: Tensor | None = None

    def padded_inputs(self, part: int, width: int) -> Tensor | None:
        """Which columns of a part's matrix [O, width] belong to padding; None: none."""
        if self.padding is None:
            return None
        mask = self.padding
        if isinstance(self.layer, ConvolutionLayer):
            mask = mask.view(self.layer.groups, -1)[part]
        return mask.repeat_interleave(width // len(mask)).nonzero().flatten()


@dataclass(frozen=True)
class Kept:
    """What a plan keeps of the dense graph's axes."""

    axes: Axes
    selection: Selection

    @staticmethod
    def of(dense: Graph, plan: PrunePlan) -> Kept:
        """The units that a plan keeps."""
        axes = infer(dense)
        units = {group.axis: kept(planned) for group, planned in plan.matched(dense, find_groups(axes))}
        return Kept(axes, Selection({a: u for a, u in units.items() if u != list(range(int(a.size)))}))

    def units(self, axis: Axis) -> Tensor | None:
        """The old index of every new one along an axis; None where it is as it was."""
        return self.selection.indices(axis) if self.selection.touches(axis) else None

    def rerouted(self) -> set[str]:
        """Names of the calls that choose otherwise because experts went: contests, and integers that come of them.

        A pruned run cannot take these over from the dense one.
        """
        found = {c.node for c in self.axes.contests if self.selection.touches(c.axis)}
        for node in self.axes.graph.nodes:
            value = value_of(node)
            is_whole = not (isinstance(value, Tensor) and value.is_floating_point())
            if is_whole and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return {node.name for node in found}

    def lost_experts(self, twin: fx.Node) -> bool:
        """Whether a product with a matrix for each expert has fewer of them now."""
        return self.selection.touches(self.axes.input(twin, 1)[0])


def find_layer(node: fx.Node) -> RefitLayer | None:
    """The layer that a call is, or None."""
    return dense_layer(node) or convolution_layer(node) or expert_layer(node)


def find_changed(dense: Graph, pruned: Graph, plan: Kept | None) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes of the pruned graph whose values differ from the dense ones, and of those the ones that lost terms."""
    twins = {n.name: n for n in dense.nodes}
    closed = (*plan.axes.sinks, *plan.axes.contests) if plan else ()
    cut = {s.node for s in closed if plan and plan.selection.touches(s.axis)}
    narrowed = {
        n for n in pruned.nodes if (twin := twins.get(n.name)) and (twin in cut or _terms(n, pruned) != _terms(twin, dense))
    }
    # What reads the stream where a branch was added to it.
    names = {n.name for n in pruned.nodes}
    bypassing = {n for n in pruned.nodes if any(is_sum(x) and x.name not in names for x in _inputs(twins.get(n.name)))}
    changed: set[fx.Node] = set()
    for node in pruned.nodes:
        if node in narrowed or node in bypassing or not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
    return changed, narrowed


def _inputs(node: fx.Node | None) -> Sequence[fx.Node]:
    return node.all_input_nodes if node is not None else ()


def _terms(node: fx.Node, graph: Graph) -> int:
    """How many units a call with a weight sums over; 0 for any other."""
    if (layer := find_layer(node)) is not None:
        return layer.matrices(graph.tensor(layer.weight).detach()).shape[2]
    if is_call(node, *ALL_CONVOLUTIONS):
        return value_of(arguments(node)["weight"]).shape[0 if is_transposed(node, arguments(node)) else 1]
    return value_of(source(node)).shape[1] if is_call(node, SORTED) else 0


def find_sites(
    dense: Graph, pruned: Graph, plan: Kept | None, changed: Collection[fx.Node], narrowed: Collection[fx.Node]
) -> tuple[list[Site], list[Refusal]]:
    """Layers to refit in graph order, and why others are not. Without a plan, layers that lost outputs are not."""
    twins = {n.name: n for n in dense.nodes}
    orders = [{node: i for i, node in enumerate(graph.nodes)} for graph in (pruned, dense)]
    uses = _uses(pruned)
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for node in pruned.nodes:
        twin = twins.get(node.name)
        if node not in changed or twin is None:
            continue
        layer, was = find_layer(node), find_layer(twin)
        why = None
        if layer is None or was is None:
            if node in narrowed and any(_is_weight(x, plan) for x in twin.all_input_nodes):
                why = "no dense layer, convolution or product with experts: left as it is"
        elif uses[layer.weight] > 1 or (layer.bias is not None and uses[layer.bias] > 1):
            why = "its weight or bias is shared"
        elif plan is not None and isinstance(layer, ExpertLayer) and plan.lost_experts(twin):
            why = "it lost experts: rows go to others now"
        elif plan is None and _outputs(layer, pruned) != _outputs(was, dense):
            why = "it lost outputs, and which is not known without the plan"
        else:
            now, was_added = ({}, {}) if not isinstance(layer, DenseLayer) else map(_residuals, (node, twin), orders)
            # Of the same sums: one may be gone, or stand behind another.
            sums = [name for name in now if name in was_added]
            residuals, were = (tuple(found[name] for name in sums) for found in (now, was_added))
            sites.append(Site(node.name, layer, residuals, were, *_units(twin, plan)))
        if why is not None:
            refusals.append(Refusal("Reconstruct", node.name, why))
    return sites, refusals


def _uses(graph: Graph) -> collections.Counter[str]:
    """How many calls read each tensor, through transposes or not."""
    uses: collections.Counter[str] = collections.Counter()
    for node in graph.nodes:
        if read_weight(node) is None:
            uses.update(str(read[0].target) for x in node.all_input_nodes if (read := read_weight(x)))
    return uses


def _is_weight(node: fx.Node, plan: Kept | None) -> bool:
    """Whether a node of the dense graph is a weight, or (where that is known) made of nothing else."""
    return read_weight(node) is not None or (plan is not None and node in plan.axes.weights)


def _outputs(layer: RefitLayer, graph: Graph) -> int:
    parts = layer.matrices(graph.tensor(layer.weight).detach())
    return parts.shape[0] * parts.shape[1]


def _units(twin: fx.Node, plan: Kept | None) -> tuple[int, Tensor | None, Tensor | None]:
    """The dimension of units of a dense layer, the outputs that stay, and which inputs are padding."""
    # A convolution's channels come before its places.
    channel = -len(arguments(twin)["stride"]) - 1 if is_call(twin, *ALL_CONVOLUTIONS) else -1
    if plan is None:
        return channel, None, None
    x = source(twin, dense.x) if (dense := dense_layer(twin)) else source(twin)
    inputs = plan.units(plan.axes.of[x][channel])
    padding = inputs == PAD if inputs is not None and (inputs == PAD).any() else None
    return channel, plan.units(plan.axes.of[twin][channel]), padding


def _residuals(layer: fx.Node, order: dict[fx.Node, int]) -> dict[str, str]:
    """Sums that the layer's output goes through -> what is added there, where that is known before the layer runs."""
    out, known = layer, {}
    shape = None
    while len(out.users) == 1:
        user = next(iter(out.users))
        if is_call(user, aten.reshape.default) and shape is None:
            out = user
            continue
        if not is_call(user, aten.add.Tensor) or user.kwargs:
            break
        shape = value_of(out).shape
        others = [x for x in user.args if x is not out]
        if len(others) != 1 or not isinstance(others[0], fx.Node) or value_of(user).shape != shape:
            break
        other = others[0]
        if other.op == "call_function" and order[other] < order[layer] and value_of(other).shape == shape:
            known[user.name] = other.name
        out = user
    return known


def blocks_of(sites: Sequence[Site], pruned: Graph) -> list[list[Site]]:
    """Sites in order; neighbours that multiply the same rows, such as q, k and v, share a block: all with a bias or none."""
    nodes = {n.name: n for n in pruned.nodes}
    blocks: list[list[Site]] = []
    for site in sites:
        last = blocks[-1][-1] if blocks else None
        seen = _shared_input(site, nodes)
        if last and seen and seen is _shared_input(last, nodes) and (site.layer.bias is None) == (last.layer.bias is None):
            blocks[-1].append(site)
        else:
            blocks.append([site])
    return blocks


def _shared_input(site: Site, nodes: dict[str, fx.Node]) -> fx.Node | None:
    """What a dense layer multiplies; None for a site that stands alone."""
    return source(nodes[site.node], site.layer.x) if isinstance(site.layer, DenseLayer) and not site.residuals else None
