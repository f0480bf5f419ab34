"""Evaluate an attention mask's sub-graph on probes: chosen sizes and chosen inputs, without running the model.

The cone of a mask is its tensor-valued ancestors. Sizes are numbers computed from the symbols, so the cone ends where
only a size is read (`sym_size`, `new_ones(x, ..)`, `zeros_like(x)`), and no activation is ever computed. Weights are
replaced by random numbers: a table of relative positions may hold zeros today.

Probes (facts: a window of 4096 looks causal below 4096):
    sizes   two sets of primes, all different; the smallest; two beyond every literal of the cone and beyond products of
            its factors; one long; one that covers every constant tensor of the cone
    inputs  ones, padded right, padded left, holes, all zeros; packed positions, packed with an offset, values around
            every literal. With several inputs also one style for each. Inputs of rank 1 are lengths: all keys, none,
            random ones.
Literals above `LARGE` are replaced by three smaller numbers each (the sub-graph is the same function of them), and
looked at once at their own size.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from tilecut_passes.graph import Graph, execute, is_call, map_nodes, number_of, size_of, sizes_of, symbols_of, value_of

aten = torch.ops.aten

# Additive masks write "masked" as -1e4, a dtype's lowest number, sums of two of those, or -inf.
MASKED = -9.9e3
# Literals up to here are probed beyond their size, larger ones are shrunk.
LARGE = 600
# Products of literals (i // 100 - j // 100 < 4) are probed up to here.
LARGEST_PRODUCT = 2048
# The longest probe, of a literal at its own size or of a constant tensor: 67 million pairs.
LONGEST = 8195
LONG = 1024
# How many scores of one text a probe may have, and one at a literal's own size: T5's have a bias for every head.
MOST_SCORES, MOST_REAL_SCORES = 1 << 23, 150_000_000
PRIMES = (7, 11, 5, 13, 3, 17, 19, 23)

BINARY = ("ones", "right", "left", "holes", "zeros")
OTHERS = ("packed", "packed with offset", "values")

# Only the shape of their first argument is read.
SHAPE_ONLY = (
    aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
)  # fmt: skip
# What mixes a model's inputs is an activation.
HEAVY = (
    aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default,
    aten.baddbmm.default, aten.embedding.default, aten.layer_norm.default, aten.softmax.int, aten.conv1d.default,
    aten.conv2d.default, aten.scaled_dot_product_attention.default,
)  # fmt: skip
# Their integers are dimensions and sizes.
NO_LITERALS = (
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.transpose.int, aten.permute.default,
    aten.reshape.default, aten.view.default, aten.expand.default, aten.cat.default, aten.stack.default,
    aten.cumsum.default, aten.unflatten.int, aten.flatten.using_ints, aten.sym_size.int, aten.new_ones.default,
    aten.zeros.default, aten.ones.default, aten.embedding.default,
)  # fmt: skip
SCALING = ("mul", "div", "floor_divide", "remainder", "fmod", "pow")


class ProbeError(Exception):
    """A probe that the sub-graph cannot be evaluated on; the message is the reason."""


@dataclass(frozen=True)
class Probe:
    """Sizes by symbol, inputs by name and what large literals are replaced by.

    `binary`: whether every input is a mask of 0 and 1.
    """

    sizes: dict[sympy.Symbol, int]
    inputs: dict[str, Tensor] = field(repr=False)
    styles: tuple[str, ...]
    literals: dict[int, int] = field(default_factory=dict)
    seed: int = 0

    @property
    def binary(self) -> bool:
        """Whether every input is a mask of 0 and 1."""
        return all(style in BINARY for style in self.styles)


class Evaluation:
    """The values of a graph's nodes on one probe, computed when asked for."""

    def __init__(self, graph: Graph, probe: Probe):
        self.graph, self.probe = graph, probe
        self.names = dict(zip(graph.placeholders, graph.inputs))
        self.known: dict[fx.Node, Any] = {}

    def __call__(self, root: fx.Node) -> Tensor:
        """The value of a tensor node.

        Raises:
            ProbeError: it depends on what the probe does not hold, or an op fails at these sizes.
        """
        todo = [root]
        # In a loop, so that a deep cone does not recurse deeply.
        while todo:
            node = todo[-1]
            missing = [n for n in _read_by(node) if n not in self.known]
            if node in self.known or not missing:
                todo.pop()
                if node not in self.known:
                    self.known[node] = self._value(node)
            else:
                todo += missing
        return self.known[root]

    def shape(self, node: fx.Node) -> list[int]:
        """A node's sizes on this probe."""
        return [number_of(s, self.probe.sizes) for s in sizes_of(value_of(node))]

    def _value(self, node: fx.Node) -> Any:
        value = value_of(node)
        if not isinstance(value, Tensor | tuple | list):
            return self._number(value)
        if node.op == "placeholder":
            if self.names[node] not in self.probe.inputs:
                raise ProbeError(f"it depends on the input {self.names[node]}")
            return self.probe.inputs[self.names[node]]
        if node.op == "get_attr":
            tensor = self.graph.tensor(str(node.target))
            if not isinstance(tensor, nn.Parameter):
                return tensor.cpu()
            seed = self.probe.seed * 1009 + zlib.crc32(str(node.target).encode())
            return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)
        args, kwargs = node.args, node.kwargs
        if self.probe.literals and not is_call(node, *NO_LITERALS):
            args, kwargs = (_shrunk(x, self.probe.literals) for x in (args, kwargs))
        args, kwargs = map_nodes(lambda n: self._given(node, n), _on_cpu(args), _on_cpu(kwargs))
        try:
            return execute(node, args, kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError) as e:
            raise ProbeError(f"its sub-graph cannot be evaluated alone ({type(e).__name__} in {node.target})") from e

    def _number(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return number_of(size_of(value), self.probe.sizes)
        if isinstance(value, torch.SymBool | torch.SymFloat):
            numbers = {symbol: sympy.Integer(n) for symbol, n in self.probe.sizes.items()}
            found = value.node.expr.xreplace(numbers)
            return bool(found) if isinstance(value, torch.SymBool) else float(found)
        return value

    def _given(self, node: fx.Node, argument: fx.Node) -> Any:
        if argument not in self.known and is_call(node, *SHAPE_ONLY):
            return torch.empty(self.shape(argument), dtype=value_of(argument).dtype)
        return self.known[argument]


def constant_of(graph: Graph, node: fx.Node) -> Tensor | None:
    """The value of a node that depends on no input, no weight and no size; None where it does."""
    nodes = cone_of(node)
    if any(n.op == "placeholder" for n in nodes) or any(_is_parameter(graph, n) for n in nodes) or random_op(nodes):
        return None
    if any(symbols_of(s) for n in nodes if isinstance(value_of(n), Tensor) for s in sizes_of(value_of(n))):
        return None
    try:
        return Evaluation(graph, Probe({}, {}, ()))(node)
    except ProbeError:
        return None


def cone_of(root: fx.Node) -> list[fx.Node]:
    """The tensor-valued ancestors of a node in graph order; where only a size is read, the path ends."""
    seen: set[fx.Node] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if node not in seen and (isinstance(value_of(node), Tensor | tuple | list) or node is root):
            seen.add(node)
            todo += _read_by(node)
    return [n for n in root.graph.nodes if n in seen]


def unprobeable(graph: Graph, cone: Sequence[fx.Node]) -> str | None:
    """Why a cone is no mask: it holds a random op, an activation or an input that is no mask and no lengths. None: it may be."""
    if random := random_op(cone):
        return f"it holds the random op {random.target}"
    names = dict(zip(graph.placeholders, graph.inputs))
    from_inputs: set[fx.Node] = set()
    for node in cone:
        if node.op == "placeholder" or not from_inputs.isdisjoint(_read_by(node)):
            from_inputs.add(node)
            if is_call(node, *HEAVY):
                return f"it depends on activations ({node.target})"
    for node in cone:
        if node.op == "placeholder" and (value_of(node).ndim not in (1, 2) or value_of(node).is_floating_point()):
            return f"it depends on the input {names[node]}, which is no rank-2 mask and holds no lengths"
    return None


def random_op(cone: Sequence[fx.Node]) -> fx.Node | None:
    """The first call in a cone that draws random numbers."""
    return next(
        (
            n
            for n in cone
            if n.op == "call_function"
            and torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
            and not (is_call(n, aten.dropout.default) and not n.args[2])
        ),
        None,
    )


def literals_of(cone: Sequence[fx.Node]) -> set[int]:
    """Whole numbers above 1 that are written into a cone's calls."""
    found: set[int] = set()
    for node in cone:
        if node.op == "call_function" and not is_call(node, *NO_LITERALS):
            found |= {math.ceil(abs(x)) for x in _numbers([*node.args, *node.kwargs.values()]) if _may_be_size(x)}
    return {x for x in found if 1 < x < 1 << 31}


def make_probes(
    graph: Graph, cone: Sequence[fx.Node], pairs: Sequence[int | sympy.Expr], heads: int, shrink: bool
) -> Iterator[Sequence[Probe]]:
    """Probes for a cone, the probes of one choice of sizes together.

    Args:
        pairs: the numbers of queries and of keys.
        heads: how many heads have a mask of their own.
        shrink: whether large literals are replaced by small ones.

    Raises:
        ProbeError: without shrinking, a literal is too large.
    """
    names = dict(zip(graph.placeholders, graph.inputs))
    used = [names[n] for n in cone if n.op == "placeholder"]
    literals = literals_of(cone)
    rows = {symbol for size in pairs for symbol in symbols_of(size)}
    longest = max((_limit(graph, symbol) for symbol in rows), default=0)
    reachable = {x for x in literals if x <= sum(_limit(graph, symbol) for symbol in rows) + 1}
    small = sorted(x for x in reachable if x <= LARGE)
    large = sorted(x for x in reachable if x > LARGE)
    values = sorted({-1, 0, 1, 2, 3, *(x + d for x in small for d in (-1, 0, 1))})
    seed = 0
    most = max(math.isqrt(MOST_SCORES // heads), *(x + 8 for x in (8, *small)))
    biggest = min(LONGEST, math.isqrt(MOST_REAL_SCORES // heads))
    if not shrink and large and large[-1] + 3 > biggest:
        raise ProbeError(f"its literal {large[-1]} is too large to probe")
    for sizes, styles, shrinks in _sizes(graph, cone, rows, small, large, min(LONG, longest, most), most, biggest):
        made = []
        for replaced in _replacements(large) if shrinks and shrink else [{}]:
            for chosen in _styles(len(used), styles):
                seed += 1
                keys = number_of(pairs[1], sizes)
                inputs = _inputs(graph, used, sizes, keys, chosen, values, seed)
                made.append(Probe(sizes, inputs, chosen, replaced, seed))
        yield made


def _sizes(
    graph: Graph,
    cone: Sequence[fx.Node],
    rows: set[sympy.Symbol],
    small: list[int],
    large: list[int],
    long: int,
    most: int,
    biggest: int,
) -> Iterator[tuple[dict[sympy.Symbol, int], tuple[str, ...], bool]]:
    """Choices of sizes, with the styles to try there, and whether large literals are shrunk."""
    every, few = (*BINARY, *OTHERS), ("ones", "holes", "packed")
    symbols = list(graph.dims)
    scaled = {
        x for n in cone if n.op == "call_function" and _name(n) in SCALING for x in literals_of([n]) if x in small
    }
    products = {a * b for a in scaled for b in small}
    reach = max([8, *small, *(x for x in products if x <= LARGEST_PRODUCT)])
    constants = [value_of(n).shape for n in cone if n.op == "get_attr"]
    whole = max((d for shape in constants for d in shape if isinstance(d, int)), default=0)
    at = lambda rest, beyond: {s: rest if s not in rows else beyond + 2 * i for i, s in enumerate(symbols)}
    choices = [
        ({s: PRIMES[i % 8] for i, s in enumerate(symbols)}, every, True),
        ({s: PRIMES[-1 - i % 8] for i, s in enumerate(symbols)}, every, True),
        (dict.fromkeys(symbols, 1), every, True),
        (at(3, min(reach + 3, most)), few, True),
        (at(2, min(2 * reach + 5, most)), few, True),
        (at(1, long), ("ones",), True),
    ]
    for real in (*(x + 3 for x in large), whole):
        if 8 < real <= biggest:
            choices.append((at(1, real), ("ones",), False))
    seen = []
    for sizes, styles, shrinks in choices:
        fitting = {s: _fit(graph, s, n) for s, n in sizes.items()}
        if (fitting, shrinks) not in seen:
            seen.append((fitting, shrinks))
            yield fitting, styles, shrinks


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if str(node.target).count(".") > 1 else str(node.target)


def _limit(graph: Graph, symbol: sympy.Symbol) -> int:
    limits = graph.ranges.get(graph.dims.get(symbol, ""))
    return 1 << 30 if limits is None or limits.max is None else limits.max


def _fit(graph: Graph, symbol: sympy.Symbol, wanted: int) -> int:
    limits = graph.ranges.get(graph.dims[symbol])
    return wanted if limits is None else min(max(wanted, limits.min), limits.max or 1 << 30)


def _replacements(large: list[int]) -> list[dict[int, int]]:
    return [{x: 4 + 3 * j + 5 * i for i, x in enumerate(large)} for j in range(3)] if large else [{}]


def _styles(inputs: int, styles: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A style for every input: the same, and, with several inputs, different ones."""
    if not inputs:
        return [()]
    shifts = (0,) if inputs == 1 else (0, 1, 3)
    return [
        tuple(styles[(i + k * shift) % len(styles)] for k in range(inputs))
        for i in range(len(styles))
        for shift in shifts
    ]


def _inputs(
    graph: Graph,
    used: Sequence[str],
    sizes: Mapping[sympy.Symbol, int],
    keys: int,
    styles: tuple[str, ...],
    values: Sequence[int],
    seed: int,
) -> dict[str, Tensor]:
    """What each input holds: masks [B, S] in their style, and lengths [B] from 0 to the number of keys."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, style in zip(used, styles, strict=True):
        node = graph.input_node(name)
        assert node is not None
        shape = [number_of(s, sizes) for s in sizes_of(value_of(node))]
        if len(shape) == 2:
            made[name] = _styled(style, shape[0], shape[1], values, generator).to(value_of(node).dtype)
        elif style in ("ones", "zeros"):
            made[name] = torch.full(shape, keys * (style == "ones"), dtype=value_of(node).dtype)
        else:
            made[name] = torch.randint(0, keys + 1, shape, generator=generator).to(value_of(node).dtype)
    return made


def _styled(style: str, batch: int, length: int, values: Sequence[int], generator: torch.Generator) -> Tensor:
    shape, places = (batch, length), torch.arange(length)[None].expand(batch, length)
    edge = torch.randint(0, length + 1, (batch, 1), generator=generator)
    if style in ("ones", "zeros"):
        return torch.full(shape, int(style == "ones"))
    if style in ("left", "right"):
        return places >= edge if style == "left" else places < edge
    if style == "holes":
        return torch.rand(shape, generator=generator) < 0.6
    if style == "values":
        return torch.tensor(values)[torch.randint(0, len(values), shape, generator=generator)]
    starts = torch.rand(shape, generator=generator) < 0.35
    starts[:, :1] = True
    first = torch.where(starts, places, 0).cummax(1).values
    offset = torch.randint(0, 5, shape, generator=generator).gather(1, first) if style == "packed with offset" else 0
    return places - first + offset


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node reads; sizes are none."""
    if not isinstance(value_of(node), Tensor | tuple | list):
        return []
    skipped = node.args[0] if is_call(node, *SHAPE_ONLY) else None
    return [n for n in node.all_input_nodes if n is not skipped]


def _is_parameter(graph: Graph, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(graph.tensor(str(node.target)), nn.Parameter)


def _numbers(given: Any) -> Iterator[int | float]:
    if isinstance(given, list | tuple):
        for one in given:
            yield from _numbers(one)
    elif isinstance(given, int | float) and not isinstance(given, bool):
        yield given


def _may_be_size(x: int | float) -> bool:
    """A negative float is what masked scores are filled with."""
    return isinstance(x, int) or 0 < x < 1 << 31


def _shrunk(given: Any, literals: Mapping[int, int]) -> Any:
    if isinstance(given, dict):
        return {name: _shrunk(one, literals) for name, one in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(_shrunk(one, literals) for one in given)
    if isinstance(given, int | float) and not isinstance(given, bool) and abs(given) in literals:
        return type(given)(math.copysign(literals[int(abs(given))], given))
    return given


def _on_cpu(given: Any) -> Any:
    """Probes run on the CPU, whatever was captured."""
    if isinstance(given, dict):
        return {name: _on_cpu(one) for name, one in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(_on_cpu(one) for one in given)
    return torch.device("cpu") if isinstance(given, torch.device) else given
