"""Replace attention in every spelling by one `tilecut::attention`.

Before: attention as `find_attention.py` lists it: fused, or written out with its scale, mask, soft-cap and softmax.
After: tilecut::attention(q, k, v, key_padding, bias, slopes, scale=, causal=, window=, global_tokens=, softcap=), heads
apart: a mask that is recognised (`recognize_mask.py`) becomes options and key_padding, a bias beside it stays, ALiBi
becomes slopes, and the rest of the mask's sub-graph dies; any other mask is kept as an additive bias, and
`graph.refusals` says why. With `packed`, a mask of packed segments makes it a tilecut::attention_varlen over the rows end
to end (`pack_segments.py`). Repeated key and value heads become grouped queries. Factors on q and k join the scale.
Left alone, with the reason in `graph.refusals`: attention weights that something else reads, dropout in training, scores
that pass anything but `find_attention.py`'s steps, operands that do not fit the op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.find_attention import Attention, Operand, find_attention, is_batched_add, keeps_order
from tilecut_passes.graph import (
    Graph,
    Refusal,
    Size,
    arguments,
    calls_before,
    is_call,
    map_nodes,
    sizes_of,
    source,
    value_of,
)
from tilecut_passes.mask_atoms import Padding, Segments
from tilecut_passes.pack_segments import Rows, find_rows, packed_attention, unpackable
from tilecut_passes.recognize_mask import MaskMeaning, recognize_mask

# Importing it registers tilecut::attention.
from tilecut_runtime import attention as _attention_op

aten = torch.ops.aten
assert _attention_op


@dataclass(frozen=True)
class FuseAttention:
    """Every attention becomes one op; with `packed`, packed segments become sequences of the packed op, else a bias."""

    packed: bool = False

    def match(self, graph: Graph, node: fx.Node) -> Attention | str | None:
        """The attention at a node, the reason why it cannot be fused, or None when it is none."""
        return find_attention(graph, node)

    def __call__(self, graph: Graph) -> int:
        """Fuse in place; returns the number of attentions."""
        shared = _Shared(self.packed)
        count = 0
        for node in list(graph.nodes):
            found = self.match(graph, node)
            if isinstance(found, Attention):
                found = _fuse(graph, found, shared)
                count += found is None
            if isinstance(found, str):
                graph.refusals.append(Refusal("FuseAttention", node.name, found))
        return count


@dataclass
class _Shared:
    """What attentions of one graph share: masks by their chains, their meanings, and nodes made for them."""

    packed: bool = False
    masks: dict[str, fx.Node | None] = field(default_factory=dict)
    meanings: dict[fx.Node, MaskMeaning | str] = field(default_factory=dict)
    paddings: dict[tuple[Padding, ...], fx.Node] = field(default_factory=dict)
    slopes: dict[tuple[float, ...], fx.Node] = field(default_factory=dict)
    rows: dict[tuple[tuple[Segments, ...], Size], Rows] = field(default_factory=dict)


def _fuse(graph: Graph, found: Attention, shared: _Shared) -> str | None:
    """Put the op in the place of an attention, or say why it does not fit."""
    if any(value_of(mask).ndim > 4 for mask in found.masks if isinstance(value_of(mask), Tensor)):
        return "its mask has more than 4 dimensions"
    with calls_before(graph, found.result) as call:
        q, k, v = (_apart(call, x, found.heads) for x in (found.q, found.k, found.v))
        k, v = _grouped(k, v)
        if reason := _misfit(q, k, v):
            return reason
        mask, meaning = _meaning(graph, found, q, k, shared)
        if isinstance(meaning, MaskMeaning) and meaning.segments and shared.packed:
            reason = unpackable(graph, meaning, q, k)
            if reason is None:
                rows = _rows(graph, meaning, q, shared)
                slopes = _slopes(graph, meaning.slopes, int(value_of(q).shape[1]), shared)
                made = packed_attention(call, q, k, v, slopes, rows, meaning, found.scale, found.softcap)
                _replace(graph, found, made)
                return None
            meaning = f"{meaning}; {reason}"
        options, given = _masking(graph, found, q, mask, meaning, shared)
        made = call(
            torch.ops.tilecut.attention.default,
            q,
            k,
            v,
            *given,
            scale=found.scale,
            softcap=found.softcap,
            dropout_p=0.0,
            **options,
        )
    _replace(graph, found, made)
    return None


def _apart(call: Callable[..., fx.Node], operand: Operand, heads: int | None) -> fx.Node:
    """An operand as [B, H, S, D]."""
    node = operand.source
    for one in operand.layout:
        node = call(one.target, node, *one.args[1:], **one.kwargs)
    if heads is not None and value_of(node).ndim == 3:
        node = call(aten.unflatten.int, node, 0, [-1, heads]) if heads > 1 else call(aten.unsqueeze.default, node, 1)
    if not operand.swapped:
        return node
    if is_call(node, aten.permute.default):
        order = [d % 4 for d in arguments(node)["dims"]]
        order = [*order[:2], order[3], order[2]]
        return source(node) if order == [0, 1, 2, 3] else call(aten.permute.default, source(node), order)
    return call(aten.transpose.int, node, -1, -2)


def _grouped(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values without the repetition of their heads, when both have the same one."""
    single = (_once(k), _once(v))
    if None not in single and len({value_of(n).shape[1] for n in single if n is not None}) == 1:
        return single  # type: ignore[return-value]
    return k, v


def _once(node: fx.Node) -> fx.Node | None:
    """The [B, G, S, D] of which a [B, G * R, S, D] repeats every head R times, or None."""
    if is_call(node, aten.repeat_interleave.self_int) and arguments(node)["dim"] in (1, -3):
        return source(node)
    if is_call(node, aten.expand.default) and value_of(source(node)).ndim == 4 and value_of(source(node)).shape[1] == 1:
        return source(node) if sizes_of(value_of(node))[2:] == sizes_of(value_of(source(node)))[2:] else None
    if not is_call(node, aten.reshape.default, aten.flatten.using_ints, aten.view.default, aten._unsafe_view.default):
        return None
    inner = source(node)
    while is_call(inner, aten.clone.default, aten.contiguous.default):
        inner = source(inner)
    if not is_call(inner, aten.expand.default) or value_of(inner).ndim != 5:
        return None
    group = source(inner)
    before, wide, after = (sizes_of(value_of(n)) for n in (group, inner, node))
    if len(before) != 5 or before[2] != 1 or [*before[:2], *before[3:]] != [*wide[:2], *wide[3:]]:
        return None
    if not is_call(group, aten.unsqueeze.default) or value_of(source(group)).ndim != 4 or after[2:] != wide[3:]:
        return None
    return source(group) if sizes_of(value_of(source(group))) == [*before[:2], *before[3:]] else None


def _misfit(q: fx.Node, k: fx.Node, v: fx.Node) -> str | None:
    """Why the op cannot take these operands, or None."""
    sizes = [sizes_of(value_of(n)) for n in (q, k, v)]
    if any(len(s) != 4 for s in sizes):
        return f"q, k and v have ranks {', '.join(str(len(s)) for s in sizes)}, wanted 4"
    of_q, of_k, of_v = sizes
    if of_k[0] != of_q[0] or of_v[0] != of_q[0]:
        return f"q, k and v have batches of {of_q[0]}, {of_k[0]} and {of_v[0]}"
    heads = [s[1] for s in sizes]
    if not all(isinstance(h, int) for h in heads) or heads[1] != heads[2] or heads[0] % heads[1]:  # type: ignore[operator]
        return f"{heads[0]} query heads on {heads[1]} key and {heads[2]} value heads"
    if len({value_of(n).dtype for n in (q, k, v)}) > 1:
        return f"q, k and v are {', '.join(str(value_of(n).dtype) for n in (q, k, v))}"
    if of_k[3] != of_q[3] or of_v[2] != of_k[2]:
        return f"q {of_q}, k {of_k} and v {of_v} do not fit"
    return None


def _meaning(
    graph: Graph, found: Attention, q: fx.Node, k: fx.Node, shared: _Shared
) -> tuple[fx.Node | None, MaskMeaning | str]:
    """The mask of an attention as one node, None where it has none, and its meaning or the reason why it has none."""
    key = _chain(found)
    if key not in shared.masks:
        shared.masks[key] = _additive(graph, found)
    mask = shared.masks[key]
    if mask is None:
        return None, MaskMeaning()
    if mask not in shared.meanings:
        shared.meanings[mask] = recognize_mask(graph, mask, q, k)
    return mask, shared.meanings[mask]


def _masking(
    graph: Graph, found: Attention, q: fx.Node, mask: fx.Node | None, meaning: MaskMeaning | str, shared: _Shared
) -> tuple[dict[str, Any], tuple[fx.Node | None, fx.Node | None, fx.Node | None]]:
    """The dense op's options, and its key_padding, bias and alibi_slopes."""
    options = {"causal": "top_left" if found.is_causal else "none", "window": [-1, -1], "global_tokens": 0}
    if mask is None:
        return options, (None, None, None)
    if isinstance(meaning, str) or meaning.beyond is not None:
        why = meaning if isinstance(meaning, str) else meaning.beyond
        graph.refusals.append(Refusal("FuseAttention", mask.name, f"mask kept as a tensor: {why}"))
        return options, (None, _as_bias(graph, found, mask), None)
    options = {"causal": meaning.causal, "window": list(meaning.window), "global_tokens": meaning.global_tokens}
    bias = None if meaning.bias is None else _named_bias(graph, found, meaning)
    slopes = _slopes(graph, meaning.slopes, int(value_of(q).shape[1]), shared)
    return options, (_key_padding(graph, meaning.paddings, mask, shared), bias, slopes)


def _chain(found: Attention) -> str:
    """Equal for attentions whose masks are the same function of the same nodes."""
    if found.product is None:
        return f"fused {found.mask} {found.heads}"
    places = {found.product: "%scores", **{s.node: f"%{i}" for i, s in enumerate(found.steps)}}
    calls = []
    for step in found.steps:
        args, kwargs = map_nodes(lambda n: places.get(n, n.name), step.node.args, step.node.kwargs)
        calls.append(f"{step.node.target} {args} {kwargs}")
    if is_batched_add(found.product):
        a = arguments(found.product)
        calls.insert(0, f"{a['self']} * {a['beta']}")
    return f"{found.heads} " + "; ".join(calls)


def _additive(graph: Graph, found: Attention) -> fx.Node | None:
    """The mask of an attention as one node of rank 2 to 4; None where it has none.

    Of one that is written out: what its steps make of scores of 0. A single 0 is enough, since they broadcast.
    """
    mask = found.mask if found.product is None else _replayed(graph, found)
    if mask is None or found.heads is None or value_of(mask).ndim != 3:
        return mask
    with calls_before(graph, found.result) as call:
        return _unfolded(call, mask, found.heads)


def _unfolded(call: Callable[..., fx.Node], mask: fx.Node, heads: int) -> fx.Node:
    """A mask [B * H|1, Sq, Sk] as [B|1, H|1, Sq, Sk]."""
    if heads > 1 and value_of(mask).shape[0] != 1:
        return call(aten.unflatten.int, mask, 0, [-1, heads])
    return call(aten.unsqueeze.default, mask, 1)


def _replayed(graph: Graph, found: Attention) -> fx.Node | None:
    assert found.product is not None
    if not found.masks:
        return None
    # Before the first node that reads the scores, so that every attention that shares the mask comes after it.
    with calls_before(graph, found.steps[-1].node if found.steps else found.result) as call:
        scores = value_of(found.product)
        if is_batched_add(found.product):
            a = arguments(found.product)
            made = a["self"] if a["beta"] == 1 else call(aten.mul.Tensor, a["self"], a["beta"])
        else:
            made = call(aten.zeros.default, [], dtype=scores.dtype, device=scores.device)
        for step in found.steps:
            node = step.node
            if keeps_order(node):
                after, rank = value_of(node).ndim, value_of(made).ndim
                if rank == 3 and after == 4 and found.heads is not None:
                    made = _unfolded(call, made, found.heads)
                continue
            args = [made if i == step.index else one for i, one in enumerate(node.args)]
            made = call(node.target, *args, **node.kwargs)
    return made if value_of(made).ndim >= 2 else None


def _as_bias(graph: Graph, found: Attention, mask: fx.Node) -> fx.Node:
    """An additive float mask of rank 4; a boolean one becomes 0 and -inf."""
    value = value_of(mask)
    with calls_before(graph, found.result) as call:
        for _ in range(4 - value.ndim):
            mask = call(aten.unsqueeze.default, mask, 0)
        if value.dtype == torch.bool:
            dropped = call(aten.logical_not.default, mask)
            zeros = call(aten.zeros_like.default, mask, dtype=value_of(found.q.source).dtype)
            return call(aten.masked_fill.Scalar, zeros, dropped, float("-inf"))
        return mask


def _named_bias(graph: Graph, found: Attention, meaning: MaskMeaning) -> fx.Node:
    node = next(n for n in graph.nodes if n.name == meaning.bias)
    with calls_before(graph, found.result) as call:
        for _ in range(4 - value_of(node).ndim):
            node = call(aten.unsqueeze.default, node, 0)
        return node if meaning.ratio == 1 else call(aten.mul.Tensor, node, meaning.ratio)


def _key_padding(graph: Graph, paddings: tuple[Padding, ...], mask: fx.Node, shared: _Shared) -> fx.Node | None:
    """One bool [B, Sk] node for what all paddings let through."""
    if not paddings:
        return None
    if paddings not in shared.paddings:
        shared.paddings[paddings] = _seen_keys(graph, paddings)
    return shared.paddings[paddings]


def _seen_keys(graph: Graph, paddings: tuple[Padding, ...]) -> fx.Node:
    """At the top of the graph where it is made of inputs, else behind the last node that it is made of."""
    nodes = {n.name: n for n in graph.nodes if n.op == "call_function"}
    inner = [nodes[p.source] for p in paddings if graph.input_node(p.source) is None]
    before = max(inner, key=lambda n: list(graph.nodes).index(n)).next if inner else graph.first_call()
    with calls_before(graph, before) as call:
        parts = []
        for one in paddings:
            node = graph.input_node(one.source) or nodes[one.source]
            is_truth = value_of(node).dtype == torch.bool and one.literal == 0
            if is_truth:
                parts.append(node if one.test == "ne" else call(aten.logical_not.default, node))
            else:
                parts.append(call(getattr(aten, one.test).Scalar, node, one.literal))
        first, *rest = parts
        for one in rest:
            first = call(aten.logical_and.default, first, one)
    return first


def _rows(graph: Graph, meaning: MaskMeaning, q: fx.Node, shared: _Shared) -> Rows:
    """The bounds of the segments, made once."""
    key = (meaning.segments, sizes_of(value_of(q))[0])
    if key not in shared.rows:
        shared.rows[key] = find_rows(graph, meaning.segments, q)
    return shared.rows[key]


def _slopes(graph: Graph, slopes: tuple[float, ...], heads: int, shared: _Shared) -> fx.Node | None:
    """A tensor [H] of the slopes; None where there are none."""
    if not slopes:
        return None
    if len(slopes) == 1:
        slopes = slopes * heads
    if slopes not in shared.slopes:
        shared.slopes[slopes] = graph.add_tensor(f"alibi_slopes_{len(shared.slopes)}", torch.tensor(slopes))
    return shared.slopes[slopes]


def _replace(graph: Graph, found: Attention, made: fx.Node) -> None:
    """Give the users of an attention's result the op's [B, H, Sq, E]."""
    node = found.result
    if found.heads is not None:
        for user in list(node.users):
            if is_call(user, aten.reshape.default) and sizes_of(value_of(user)) == sizes_of(value_of(made)):
                user.replace_all_uses_with(made)
                graph.fx.erase_node(user)
    if node.users:
        with calls_before(graph, node) as call:
            folded = made if found.heads is None else call(aten.flatten.using_ints, made, 0, 1)
        node.replace_all_uses_with(folded)
    graph.fx.erase_node(node)
