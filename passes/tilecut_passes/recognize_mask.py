"""What an attention mask means: evaluate its sub-graph on probes and compare with hypotheses.

A mask is a cone of graph nodes that ends in sizes, buffers and small integer inputs such as `attention_mask`. It is
evaluated at several sizes (all different, the smallest, and sizes beyond every integer literal in the cone) on inputs
that are all ones, padded left, padded right and full of holes. The hypotheses are products of

    causal       none, top-left or bottom-right
    key padding  none, or one of the rank-2 inputs: keys where it is non-zero (or zero) are seen

and one is the meaning when it equals the mask on every probe. This is evidence, not proof: the compile's own parity
check on whole models stands behind it. A mask without a meaning is kept as a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tilecut_passes.graph import Graph, Size, execute, map_nodes, number_of, sizes_of, value_of

aten = torch.ops.aten

# Additive masks write "masked" as -1e4, a dtype's lowest number, sums of two of those, or -inf.
MASKED = -9.9e3
LARGEST_PROBE = 4096


@dataclass(frozen=True)
class MaskMeaning:
    """`causal` as the attention op spells it; `padding` names an input, `inverted` when its zeros are the keys to see."""

    causal: str = "none"
    padding: str | None = None
    inverted: bool = False


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
    observed = []
    for size in sizes:
        for style in ("ones", "left", "right", "holes"):
            probe = _probe(graph, inputs, size, style)
            try:
                visible = _visible(_evaluate(graph, cone, mask, probe))
            except (RuntimeError, IndexError, TypeError, ValueError) as e:
                return f"its sub-graph cannot be evaluated alone ({type(e).__name__})"
            if isinstance(visible, str):
                return visible
            observed.append((probe, visible, _length(graph, query, size), _length(graph, key, size)))
    candidates = [
        MaskMeaning(causal, padding, inverted)
        for padding, inverted in [(None, False), *((name, flip) for name in inputs for flip in (False, True))]
        for causal in ("none", "top_left", "bottom_right")
    ]
    for meaning in candidates:
        if all(_fits(meaning, *row) for row in observed):
            return meaning
    return "no product of causal and key padding equals it"


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


def _probe_sizes(graph: Graph, cone: list[fx.Node]) -> list[dict[str, int]] | str:
    """Sizes for every named dimension: distinct primes twice, the smallest, and beyond each literal that can be reached."""
    names = list(graph.dims.values())
    literals = {
        abs(a)
        for n in cone
        if n.op == "call_function"
        for a in (*n.args, *n.kwargs.values())
        if isinstance(a, int) and not isinstance(a, bool)
    }
    longest = max((graph.ranges[d].max or 1 << 40 for d in names if d in graph.ranges), default=1 << 40)
    reached = [x for x in literals if 1 < x <= longest]
    if reached and max(reached) > LARGEST_PROBE:
        return f"its literal {max(reached)} is too large to probe"
    primes = [2, 7, 11, 5, 13, 3, 17]
    rows = [
        [primes[i % 7] for i in range(len(names))],
        [3 if i == 0 else primes[-1 - i % 7] for i in range(len(names))],
        [1] * len(names),
    ]
    if reached:
        rows.append([2 if i == 0 else min(max(reached) + 3 + 2 * i, longest) for i in range(len(names))])
        rows.append([2 if i == 0 else min(2 * max(reached) + 5 + 2 * i, longest) for i in range(len(names))])
    return [dict(zip(names, row)) for row in rows]


def _number(graph: Graph, size: Size, at: Mapping[str, int]) -> int:
    return number_of(size, {symbol: at[name] for symbol, name in graph.dims.items()})


def _length(graph: Graph, node: fx.Node, at: Mapping[str, int]) -> int:
    return _number(graph, sizes_of(value_of(node))[-2], at)


def _probe(graph: Graph, inputs: list[str], at: Mapping[str, int], style: str) -> dict[str, Tensor]:
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


def _visible(mask: Tensor) -> Tensor | str:
    """Bool [B|1, 1, Sq, Sk] of the pairs that a mask lets through."""
    if mask.ndim != 4:
        return f"it has rank {mask.ndim}, wanted 4"
    if mask.dtype != torch.bool:
        visible = mask > MASKED
        if (mask[visible] != 0).any():
            return "it adds a bias to visible scores"
        mask = visible
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
        want = want & ((padding == 0) if meaning.inverted else (padding != 0))[:, None, None, :]
    try:
        a, b = torch.broadcast_tensors(want, visible)
    except RuntimeError:
        return False
    return bool((a == b).all())
