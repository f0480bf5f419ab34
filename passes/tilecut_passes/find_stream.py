"""Whether a residual stream can be turned to another basis: what is along it, and what each thing does with its channels.

Everything that writes, reads, moves, sums or norms the stream must treat its channels as a vector. What a norm's weight has
scaled may only be read by matrices, into which the weight can be folded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from tilecut_passes.axes.axis import Axis
from tilecut_passes.axes.expert_rows import GROUPED
from tilecut_passes.axes.groups import Group, Member, find_groups
from tilecut_passes.axes.infer import Axes, dims_of, infer
from tilecut_passes.axes.rules_convolutions import CONVOLUTIONS
from tilecut_passes.axes.rules_normalizations import LAYER_NORMS
from tilecut_passes.axes.rules_reductions import SUMS
from tilecut_passes.fuse_rms_norm import FuseRmsNorm
from tilecut_passes.graph import CASTS, Graph, arguments, before_casts, is_call
from tilecut_passes.open_stream import NORM, split_norms, untie_heads
from tilecut_passes.read_contractions import LINEARS, MATMULS

aten = torch.ops.aten
# A norm's bias is divided by its weights: none may be smaller than this share of the largest.
SMALLEST = 1e-4
PRODUCTS = (*LINEARS, *MATMULS, *GROUPED, *CONVOLUTIONS)
# Ops that move numbers, and do nothing to them.
MOVES = (
    *CASTS,
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.index.Tensor,
    aten.cat.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.dropout.default,
)  # fmt: skip
SUMMED = (aten.add.Tensor, aten.sub.Tensor)
SCALED = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)
# What a matrix reads where no norm is in front of it.
STREAM = "the stream itself"


class CannotRotate(Exception):
    """Why a stream cannot be turned."""


@dataclass
class Stream:
    """A residual stream that can be turned.

    Attributes:
        members: what the group owns, before a head gets a tensor of its own.
        width: H.
        tensors: name -> the dimensions that are along the stream; weights of norms are not among them.
        norms: weight of a norm -> what it is short of the factor (1 where the model computes 1 + w).
        offsets: bias of a norm -> the norm's weight.
        readers: (tensor, dimension) -> the weight of the norm that it is read behind.
        centred: its norms are LayerNorms; `calls` are their nodes' names.
    """

    members: tuple[Member, ...]
    width: int
    tensors: dict[str, list[int]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    offsets: dict[str, str] = field(default_factory=dict)
    readers: dict[tuple[str, int], str] = field(default_factory=dict)
    centred: bool = False
    calls: frozenset[str] = frozenset()


def find_stream(graph: Graph, name: str) -> Stream:
    """The stream of a `hidden` group.

    Raises:
        CannotRotate: something needs its channels as they are.
    """
    # Names of tensors are the same in a copy with norms in one op each.
    fused = graph.copy()
    axes = infer(fused)
    group = next((g for g in find_groups(axes) if g.name == name), None)
    if group is None:
        raise CannotRotate("there is no such group")
    calls = frozenset(n.name for n in _layer_norms(axes, group.axis))
    split_norms(fused, calls)
    untie_heads(fused, {m.parameter for m in group.members})
    FuseRmsNorm()(fused)
    fused.clean()
    axes = infer(fused)
    # Its name goes by its members, and a head of its own is one more.
    leaf = stream_of(axes, group.members).axis
    found = Stream(group.members, int(leaf.size), centred=bool(calls), calls=calls)
    norms = [n for n in axes.graph.nodes if is_call(n, NORM) and axes.input(n)[-1].root is leaf]
    if calls and len(norms) > len(calls):
        raise CannotRotate("some of its norms take the mean of the channels away, and some do not")
    stream = _Reader(axes, leaf, found).read()
    for bias, weight in stream.offsets.items():
        sizes = graph.tensor(weight).detach().abs()
        if sizes.min() < SMALLEST * sizes.max():
            raise CannotRotate(f"{weight} has numbers near 0, by which {bias} would be divided")
    return stream


def stream_of(axes: Axes, members: Iterable[Member]) -> Group:
    """The `hidden` group that has these members, and maybe a head of its own."""
    wanted = set(members)
    return next(g for g in find_groups(axes) if g.kind == "hidden" and wanted <= set(g.members))


def _layer_norms(axes: Axes, leaf: Axis) -> list[fx.Node]:
    """The LayerNorms over a stream."""
    found = [n for n in axes.graph.nodes if is_call(n, aten.layer_norm.default) and len(arguments(n)["normalized_shape"]) == 1]
    return [n for n in found if axes.input(n)[-1].root is leaf]


class _Reader:
    """Reads what a graph does along one leaf, whose norms are one op each."""

    def __init__(self, axes: Axes, leaf: Axis, found: Stream):
        self.axes, self.leaf, self.found = axes, leaf, found
        # Behind which norm's weight an activation is.
        self.behind: dict[fx.Node, str] = {}
        # What a norm has given, with a weight or without.
        self.normed: set[fx.Node] = set()
        self.reads: dict[tuple[str, int], set[str]] = {}

    def read(self) -> Stream:
        for name, types in self.axes.tensors.items():
            dims = [d for d, axis in enumerate(types) if self.leaf in axis.leaves]
            if dims and not (all(types[d].root is self.leaf for d in dims) and self._is_floating(name)):
                raise CannotRotate(f"{name} holds its channels in another order")
            if dims:
                self.found.tensors[name] = dims
        for node in self.axes.graph.nodes:
            if node.op == "call_function" and any(map(self._holds, (node, *node.all_input_nodes))):
                self._call(node)
        for norm in self.found.norms:
            if (norm, 0) in self.reads:
                raise CannotRotate(f"{norm} is more than the weight of a norm")
            self.found.tensors.pop(norm)
        for (name, dim), norms in self.reads.items():
            if norms == {STREAM}:
                continue
            if len(norms) > 1:
                raise CannotRotate(f"{name} is read behind the weights of several norms, or as a table too")
            self.found.readers[name, dim] = norms.pop()
        return self.found

    def _is_floating(self, name: str) -> bool:
        return self.axes.graph.tensor(name).is_floating_point()

    def _holds(self, node: fx.Node) -> bool:
        types = self.axes.of.get(node)
        return bool(types) and any(t is not None and not isinstance(t, list) and self.leaf in t.leaves for t in types)

    def _dims(self, node: fx.Node) -> list[int]:
        """The dimensions of a tensor that are the stream's channels.

        Raises:
            CannotRotate: they are only a part of a dimension.
        """
        types = self.axes.of[node]
        assert isinstance(types, list)
        dims = [d for d, t in enumerate(types) if isinstance(t, Axis) and self.leaf in t.leaves]
        if any(isinstance(t, Axis) and self.leaf in t.leaves and t.root is not self.leaf for t in types):
            raise CannotRotate(f"{node.name} mixes its channels with another dimension")
        return dims

    def _call(self, node: fx.Node) -> None:
        held = [x for x in node.all_input_nodes if self._holds(x)]
        for one in held:
            self._dims(one)
        if is_call(node, *LAYER_NORMS) and not is_call(node, NORM):
            raise CannotRotate(f"{node.name} is a LayerNorm, which subtracts the mean of the channels")
        if not isinstance(self.axes.of.get(node), list) or any(isinstance(t, list) for t in self.axes.of[node] or ()):
            raise CannotRotate(f"{node.name} works on single channels")
        self._dims(node)
        if is_call(node, NORM):
            self._norm(node)
        elif is_call(node, aten.embedding.default):
            for x in held:
                self._use(x, self._dims(x)[0], STREAM)
        elif is_call(node, *PRODUCTS) and arguments(node).get("groups", 1) == 1:
            self._product(node, held)
        elif is_call(node, *SUMMED) and len(held) == 2 and self._is_offset(node):
            pass
        elif is_call(node, *SUMMED) and len(held) == 2:
            if scaled := [x for x in held if x in self.behind]:
                raise CannotRotate(f"{node.name} adds {scaled[0].name}, which the weight of a norm has scaled, to the stream")
            for x in held:
                if self._tensor_of(x) is not None:
                    self._use(x, self._dims(x)[0], STREAM)
            if self.found.centred and any(x in self.normed for x in held):
                raise CannotRotate(f"{node.name} adds to what a norm without a weight gives")
        elif self._is_equivariant(node, held):
            for x in held:
                self._hand_on(x, node)
        elif not self._is_one_more(node):
            raise CannotRotate(f"{node.name} works on single channels")

    def _is_offset(self, node: fx.Node) -> bool:
        """Whether a sum adds a norm's bias to what its weight has scaled; then it is behind the norm too."""
        norm, bias = node.args[:2]
        if not (is_call(norm, NORM) and norm in self.behind and isinstance(bias, fx.Node) and bias.op == "get_attr"):
            return False
        name, weight = str(bias.target), self.behind[norm]
        if self.found.offsets.setdefault(name, weight) != weight or len(bias.users) > 1:
            raise CannotRotate(f"{name} is added behind several norms")
        self._hand_on(norm, node)
        return True

    def _hand_on(self, x: fx.Node, node: fx.Node) -> None:
        """What was said of `x` holds for `node`."""
        if x in self.normed:
            self.normed.add(node)
        if x in self.behind:
            self.behind[node] = self.behind[x]

    def _is_equivariant(self, node: fx.Node, held: list[fx.Node]) -> bool:
        """Whether turning what a call reads turns what it gives."""
        if is_call(node, *MOVES):
            return True
        if is_call(node, *SUMS, aten.mean.dim):
            return self._holds(node) and self._over_others(node)
        # By what has no channels: a number for each position.
        return len(held) == 1 and (is_call(node, aten.mul.Tensor) or (is_call(node, *SCALED) and node.args[0] is held[0]))

    def _over_others(self, node: fx.Node) -> bool:
        x = node.all_input_nodes[0]
        rank = len(self.axes.of[x] or ())
        dims = dims_of(arguments(node).get("dim"), rank)
        return not set(dims) & set(self._dims(x))

    def _is_one_more(self, node: fx.Node) -> bool:
        """1 + w of a norm's weight w."""
        if not is_call(node, *SUMMED, aten.add.Scalar) or not any(isinstance(x, int | float) for x in node.args[:2]):
            return False
        if self._tensor_of(node.all_input_nodes[0]) is None:
            return False
        casts = [user for user in node.users if is_call(user, *CASTS)]
        weighed = [user for one in (node, *casts) for user in one.users if user not in casts]
        return all(is_call(user, NORM) and user.args[0] not in (node, *casts) for user in weighed)

    def _norm(self, node: fx.Node) -> None:
        a = arguments(node)
        x, weight = a["input"], before_casts(a["weight"]) if a.get("weight") is not None else None
        if x in self.behind:
            raise CannotRotate(f"{node.name} norms what another norm's weight has scaled")
        self.normed.add(node)
        if weight is None:
            return
        short = 0.0
        if is_call(weight, aten.add.Tensor, aten.add.Scalar):
            numbers = [one for one in weight.args[:2] if isinstance(one, int | float)]
            nodes = [one for one in weight.args[:2] if isinstance(one, fx.Node)]
            if len(numbers) == 1 and len(nodes) == 1:
                short, weight = float(numbers[0]), before_casts(nodes[0])
        if weight.op != "get_attr":
            raise CannotRotate(f"the weight of {node.name} is computed")
        name = str(weight.target)
        if self.found.norms.setdefault(name, short) != short:
            raise CannotRotate(f"{name} is the weight of different norms")
        self.behind[node] = name

    def _product(self, node: fx.Node, held: list[fx.Node]) -> None:
        """A matrix that reads the stream, or writes to it."""
        activations = [x for x in held if self._tensor_of(x) is None]
        for x in held:
            tensor = self._tensor_of(x)
            if tensor is None:
                continue
            read = [a for a in activations if self._contracted(node, a, x)]
            # Without an activation that has channels, it writes them.
            behind = self.behind.get(read[0], STREAM) if read else STREAM
            if self.found.centred and read and read[0] not in self.normed:
                raise CannotRotate(f"{node.name} reads the stream without a norm, and LayerNorms the mean away elsewhere")
            dims = self.found.tensors[tensor]
            if len(dims) > 1 and behind != STREAM:
                raise CannotRotate(f"{tensor} reads and writes the stream")
            for dim in dims:
                self._use(x, dim, behind)
        if self._holds(node) and any(x in self.behind for x in activations):
            raise CannotRotate(f"{node.name} hands on what a norm's weight has scaled")
        if len(activations) > 1 or (activations and len(held) == len(activations)):
            raise CannotRotate(f"{node.name} multiplies activations along the channels")

    def _contracted(self, node: fx.Node, activation: fx.Node, weight: fx.Node) -> bool:
        return any(s.node is node and s.source is activation and s.axis.root is self.leaf for s in self.axes.sinks)

    def _tensor_of(self, node: fx.Node) -> str | None:
        """The tensor that an operand is, read through views and casts."""
        while is_call(node, *MOVES) and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return str(node.target) if node.op == "get_attr" else None

    def _use(self, x: fx.Node, dim: int, behind: str) -> None:
        name = self._tensor_of(x)
        if name is None:
            raise CannotRotate(f"{x.name} is a computed matrix along the channels")
        self.reads.setdefault((name, dim), set()).add(behind)

