"""Lower `tilecut::attention` to torch_npu's `npu_fused_infer_attention_score`.

Before: tilecut::attention(q [B, N, Sq, D], k [B, Nk, Sk, D], v, key_padding, bias, ..). After: the op in fp16 (bf16 stays)
with its scale, heads and layout, and the sparse_mode, pre_tokens, next_tokens and form of the mask that the legality table
chooses for FusedInferAttentionScore (`legality.choose`); True in the mask means drop. A full mask, [B, 1, Sq, Sk], is made
once for all attentions that share it. Where q, k, v are transposed from [B, S, N, D] and the result back, the op gets that
layout (BSND) and the four transposes go.

Padding is always a mask. actual_seq_lengths are numbers on the host, one a row, and count from the left: neither how many
rows a batch has nor on which side they are padded is known when a model is compiled.

Left alone, with the limit and the nearest legal choice in `graph.refusals` (it then becomes MatMul and Softmax): what
`legality.Refused` says. A bias that is no mask could be the op's pse_shift, which is added in fp16 and wants shapes of
its own; that was not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from tilecut_passes.graph import (
    Graph,
    Refusal,
    arguments,
    calls_before,
    is_call,
    sizes_of,
    source,
    swaps_heads,
    value_of,
)
from tilecut_runtime.npu_attention import OP, TRIANGLE
from tilecut_targets.ascend import npu_ops
from tilecut_targets.ascend.legality import Fused, Refused, choose
from tilecut_targets.ascend.lower_attention import attention_shape, hidden_node

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerInferAttention:
    """Every attention within the limits of a family of chips becomes one fused op."""

    family: str = "a2"

    def match(self, node: fx.Node) -> Fused | Refused:
        """The op's arguments, or the limit that the attention breaks."""
        wanted = attention_shape(node, str(_inside(value_of(arguments(node)["q"]))).removeprefix("torch."))
        found = choose(self.family, wanted, "air")
        if isinstance(found, Fused) and _is_between_transposes(node):
            flat = choose(self.family, replace(wanted, layout="BSND"), "air")
            return flat if isinstance(flat, Fused) else found
        return found

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of attentions."""
        count = 0
        masks: dict[str, fx.Node] = {}
        for node in [n for n in graph.nodes if is_call(n, torch.ops.tilecut.attention.default)]:
            found = self.match(node)
            if isinstance(found, Refused):
                graph.refusals.append(Refusal("LowerInferAttention", node.name, str(found)))
                continue
            _lower(graph, node, found, masks)
            count += 1
        return count


def _inside(q: Tensor) -> torch.dtype:
    """The type that the op computes in."""
    return q.dtype if q.dtype == torch.bfloat16 else torch.float16


def _is_between_transposes(node: fx.Node) -> bool:
    """Whether q, k and v come from [B, S, N, D] and the result goes there."""
    a = arguments(node)
    return all(swaps_heads(n) for n in (a["q"], a["k"], a["v"], *node.users))


def _lower(graph: Graph, node: fx.Node, found: Fused, masks: dict[str, fx.Node]) -> None:
    a = arguments(node)
    flat = found.layout == "BSND"
    with calls_before(graph, node) as call:
        mask = _mask(call, node, found, masks)
        q, k, v = (source(a[name]) if flat else a[name] for name in "qkv")
        options = {
            "num_heads": int(value_of(a["q"]).shape[1]),
            "num_key_value_heads": found.kv_heads,
            "scale": a["scale"],
            "input_layout": found.layout,
            "sparse_mode": found.sparse_mode,
            "pre_tokens": found.pre_tokens,
            "next_tokens": found.next_tokens,
            "inner_precise": found.inner_precise,
        }
        lowered = call(fused_infer_attention, q, k, v, mask, options)
    # In BSND the users are the transposes that go.
    for user in list(node.users) if flat else [node]:
        user.replace_all_uses_with(lowered)
        graph.fx.erase_node(user)
    if flat:
        graph.fx.erase_node(node)


def _mask(call: Callable[..., fx.Node], node: fx.Node, found: Fused, masks: dict[str, fx.Node]) -> fx.Node | None:
    """The node of a mask in the form that was chosen; the same mask is made once."""
    if found.mask == "none":
        return None
    a = arguments(node)
    if found.mask == "compressed":
        if "compressed" not in masks:
            masks["compressed"] = call(triangle, a["q"])
        return masks["compressed"]
    rules = {"causal": a["causal"], "window": list(a["window"]), "global_tokens": a["global_tokens"]}
    sizes = [str(sizes_of(value_of(a[name]))[i]) for name, i in (("q", 0), ("q", 2), ("k", 2))]
    key = str([sizes, a["key_padding"], a["bias"], rules])
    if key not in masks:
        hidden = None if a["bias"] is None else hidden_node(call, a["bias"])
        masks[key] = call(npu_ops.hidden_pairs, a["q"], a["k"], a["key_padding"], hidden, **rules)
    return masks[key]


def triangle(q: Tensor) -> Tensor:
    """The compressed mask, bool [2048, 2048], True above the diagonal, on q's device.

    It is made in the graph: a program's weights are those of the pruned model, and nothing else.
    """
    place = torch.arange(TRIANGLE, device=q.device)
    return place[None, :] > place[:, None]


def fused_infer_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict) -> Tensor:
    """The op's output in its layout and q's dtype; `options` are the op's own."""
    out, _ = OP(*(x.to(_inside(q)) for x in (q, k, v)), atten_mask=mask, **options)
    return out.to(q.dtype)
