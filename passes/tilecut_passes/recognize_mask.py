"""What an attention mask means: evaluate its sub-graph on probes and compare with hypotheses.

A mask is a cone of graph nodes that ends in sizes, buffers and small integer inputs such as `attention_mask`. It is
evaluated at several sizes (all different, the smallest, the longest, and sizes beyond every literal in the cone and
beyond products of two) on inputs that are all ones, padded left, padded right, full of holes, and of values around
every literal. The hypotheses are products of

    causal       none, top-left or bottom-right
    key padding  none, or one of the rank-2 inputs compared with a literal: keys where `input != 0`, `input == 1`, .. are
                 seen

and one is the meaning when it equals the mask on every probe. This is evidence, not proof: the compile's own parity
check on whole models stands behind it. A mask without a meaning is kept as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tilecut_passes.graph import Graph, Size, execute, map_nodes, number_of, sizes_of, value_of

aten = torch.ops.aten

PREDICATES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ne": torch.ne, "eq": torch.eq, "gt": torch.gt, "ge": torch.ge, "lt": torch.lt, "le": torch.le,
}  # fmt: skip
# Additive masks write "masked" as -1e4, a dtype's lowest number, sums of two of those, or -inf.
MASKED = -9.9e3
LARGEST_PROBE = 4096
# How long the longest probe is where the model sets no limit.
LONG = 1024


@dataclass(frozen=True)
class MaskMeaning:
    """`causal` as the attention op spells it; keys where `padding`, an input, is `keep` (as in ("ne", 0)) are seen."""

    causal: str = "none"
    padding: str | None = None
    keep: tuple[str, int] = ("ne", 0)


def recognize_mask(graph: Graph, mask: fx.Node, query: fx.Node, key: fx.Node) -> MaskMeaning | str:
    """The meaning of `mask` [B|1, H|1, Sq, Sk] for these queries and keys, or the reason why it has none."""
    cone = _cone(mask)
    if blocked := next(
        (n for n in cone if n.op == "get_attr" and isinstance(graph.tensor(str(n.target)), nn.Parameter)), None
    ):
        return f"it depends on the weight {blocked.target}"
    names = dict(zip(graph.placeholders, graph.inputs))
    inputs = [names[n] for n in cone if n.op == "placeholder"]
    if odd := next(
        (n for n in cone if n.op == "placeholder" and (value_of(n).ndim != 2 or value_of(n).is_floating_point())), None
    ):
        return f"it depends on the input {names[odd]}, which is no rank-2 mask"
    if random := next(
        (
            n
            for n in cone
            if n.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
        ),
        None,
    ):
        return f"it holds the random op {random.target}"
    sizes = _probe_sizes(graph, cone)
    if isinstance(sizes, str):
        return sizes
    literals = {0, 1, *(x for x in _literals(cone) if isinstance(x, int) and abs(x) < 1 << 31)}
    values = sorted({-1, 2, *(x + d for x in literals for d in (-1, 0, 1))})
    candidates = [
        MaskMeaning(causal, padding, keep)
        for padding, keep in [
            (None, ("ne", 0)),
            *((name, (test, x)) for name in inputs for x in sorted(literals, key=abs) for test in PREDICATES),
        ]
        for causal in ("none", "top_left", "bottom_right")
    ]
    for size in sizes:
        sq, sk = _length(graph, query, size), _length(graph, key, size)
        for style in ("ones", "left", "right", "holes", "values"):
            probe = _probe(graph, inputs, size, style, values)
            try:
                visible = _visible(_evaluate(graph, cone, mask, probe), any_bias=style == "values")
            except (RuntimeError, IndexError, TypeError, ValueError) as e:
                return f"its sub-graph cannot be evaluated alone ({type(e).__name__})"
            if isinstance(visible, str):
                return visible
            candidates = [meaning for meaning in candidates if _fits(meaning, probe, visible, sq, sk)]
            if not candidates:
                return "no product of causal and key padding equals it"
    return candidates[0]


def _cone(root: fx.Node) -> list[fx.Node]:
    """Ancestors of the mask in graph order; where only a size is read, the path ends at its input."""
    seen: set[fx.Node] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if node not in seen and not isinstance(value_of(node), int | torch.SymInt):
            seen.add(node)
            todo += node.all_input_nodes
    return [n for n in root.graph.nodes if n in seen]


def _literals(cone: list[fx.Node]) -> set[int | float]:
    """Numbers written into the cone's calls."""
    return {
        a
        for n in cone
        if n.op == "call_function"
        for a in (*n.args, *n.kwargs.values())
        if isinstance(a, int | float) and not isinstance(a, bool)
    }


def _probe_sizes(graph: Graph, cone: list[fx.Node]) -> list[dict[str, int]] | str:
    """Sizes for every dimension: primes twice, the smallest, the longest, and beyond each literal that can be reached."""
    names = list(graph.dims.values())
    longest = max((graph.ranges[d].max or 1 << 40 for d in names if d in graph.ranges), default=1 << 40)
    # A negative float is what masked scores are filled with.
    written = [x for x in _literals(cone) if isinstance(x, int) or x > 0]
    literals = {math.ceil(abs(x)) for x in written if abs(x) <= longest}
    if literals and max(literals) > LARGEST_PROBE:
        return f"its literal {max(literals)} is too large to probe"
    products = {a * b for a in literals for b in literals}
    reached = [x for x in literals | {x for x in products if x <= LARGEST_PROBE // 2} if 1 < x <= longest]
    primes = [2, 7, 11, 5, 13, 3, 17]
    rows = [
        [primes[i % 7] for i in range(len(names))],
        [3 if i == 0 else primes[-1 - i % 7] for i in range(len(names))],
        [1] * len(names),
        [2 if i == 0 else min(LONG, longest) for i in range(len(names))],
    ]
    if reached:
        rows.append([2 if i == 0 else min(max(reached) + 3 + 2 * i, longest) for i in range(len(names))])
        if 2 * max(reached) < LARGEST_PROBE:
            rows.append([2 if i == 0 else min(2 * max(reached) + 5 + 2 * i, longest) for i in range(len(names))])
    return [dict(zip(names, row)) for row in rows]


def _number(graph: Graph, size: Size, at: Mapping[str, int]) -> int:
    return number_of(size, {symbol: at[name] for symbol, name in graph.dims.items()})


def _length(graph: Graph, node: fx.Node, at: Mapping[str, int]) -> int:
    return _number(graph, sizes_of(value_of(node))[-2], at)


def _probe(graph: Graph, inputs: list[str], at: Mapping[str, int], style: str, values: list[int]) -> dict[str, Tensor]:
    """Real tensors for every input of the graph: the mask's own in the given style, the others zeros of the right shape."""
    generator = torch.Generator().manual_seed(7)
    out = {}
    for name, node in zip(graph.inputs, graph.placeholders, strict=True):
        shape = [_number(graph, s, at) for s in sizes_of(value_of(node))]
        if name not in inputs:
            out[name] = torch.zeros(shape, dtype=value_of(node).dtype)
            continue
        batch, length = shape
        ramp, edge = torch.arange(length)[None], torch.randint(0, length + 1, (batch, 1), generator=generator)
        value = {
            "ones": torch.ones(shape, dtype=torch.bool),
            "right": ramp < edge,
            "left": ramp >= edge,
            "holes": torch.rand(shape, generator=generator) < 0.6,
            "values": torch.tensor(values)[torch.randint(0, len(values), shape, generator=generator)],
        }[style]
        out[name] = value.to(value_of(node).dtype)
    return out


def _evaluate(graph: Graph, cone: list[fx.Node], root: fx.Node, inputs: Mapping[str, Tensor]) -> Tensor:
    names = dict(zip(graph.placeholders, graph.inputs))
    memo: dict[fx.Node, object] = {}

    def read(node: fx.Node) -> object:
        if node not in memo:
            if node.op == "placeholder":
                memo[node] = inputs[names[node]]
            elif node.op == "get_attr":
                memo[node] = graph.tensor(str(node.target)).cpu()
            else:
                args, kwargs = map_nodes(read, node.args, node.kwargs)
                kwargs = {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}
                memo[node] = execute(node, args, kwargs)
        return memo[node]

    # In order, so that a deep cone does not recurse deeply.
    for node in cone:
        read(node)
    result = memo[root]
    assert isinstance(result, Tensor)
    return result


def _visible(mask: Tensor, any_bias: bool) -> Tensor | str:
    """[B|1, 1, Sq, Sk]: 1 for pairs that a mask lets through, 0 for others.

    A bias on visible pairs is no mask. With `any_bias` it is -1 instead: (1 - mask) * min means nothing for a mask of 2.
    """
    if mask.ndim != 4:
        return f"it has rank {mask.ndim}, wanted 4"
    if mask.dtype != torch.bool:
        biased = ~((mask == 0) | (mask <= MASKED))
        if biased.any() and not any_bias:
            return "it adds a bias to visible scores"
        mask = torch.where(biased, -1, (mask == 0).to(torch.int8))
    mask = mask.to(torch.int8)
    if mask.shape[1] != 1:
        if not (mask == mask[:, :1]).all():
            return "it differs between heads"
        mask = mask[:, :1]
    return mask


def _fits(meaning: MaskMeaning, inputs: Mapping[str, Tensor], visible: Tensor, sq: int, sk: int) -> bool:
    want = torch.ones(1, 1, sq, sk, dtype=torch.bool)
    if meaning.causal != "none":
        want = want.tril(0 if meaning.causal == "top_left" else sk - sq)
    if meaning.padding is not None:
        padding = inputs[meaning.padding]
        if padding.shape[1] != sk:
            return False
        test, literal = meaning.keep
        want = want & PREDICATES[test](padding, literal)[:, None, None, :]
    try:
        a, b = torch.broadcast_tensors(want, visible)
    except RuntimeError:
        return False
    return bool(((a == b) | (b < 0)).all())
