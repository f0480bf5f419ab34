"""Lower `tilecut::attention` to the Attention op of standard ONNX (opset 23).

Before: tilecut::attention(q, k, v, key_padding, bias), heads apart: [B, H, S, D].
After: ai.onnx::Attention(q, k, v, mask): key padding, bias, window and global tokens are one additive mask
[B|1, Hq|1, Sq, Sk], made once for all attentions that share them. It is never -inf: a query that sees no key gives some
finite mixture of the values, as in the other targets.
Left alone, with the reason in `graph.refusals` (the exporter then writes MatMul and Softmax): soft-caps, whose order with
the mask the runtimes do not agree on, ALiBi in the op, dropout, and causal attention whose queries and keys differ in
number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, Refusal, arguments, calls_before, sizes_of, value_of
from tilecut_targets.decompose_attention import finite
from tilecut_targets.edge import onnx_ops
from tilecut_targets.edge.lower_attention import find_attentions
from tilecut_targets.window_bias import window_bias


@dataclass(frozen=True)
class LowerStandardAttention:
    """Every attention that opset 23 has the op for becomes one; `packable` as for LowerAttention."""

    packable: bool | None = None

    def match(self, node: fx.Node) -> str | None:
        """Why the op cannot express this attention, or None when it can."""
        a = arguments(node)
        if a["dropout_p"]:
            return "dropout: the op has none"
        if a["softcap"] or a["alibi_slopes"] is not None:
            return "soft-cap or ALiBi: left to MatMul and Softmax"
        if a["causal"] != "none" and sizes_of(value_of(a["q"]))[2] != sizes_of(value_of(a["k"]))[2]:
            return f"{a['causal']} causal attention between different numbers of queries and keys"
        return None

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of attentions."""
        made: dict[str, fx.Node] = {}
        count = 0
        for node in find_attentions(graph, self.packable):
            if reason := self.match(node):
                graph.refusals.append(Refusal("LowerStandardAttention", node.name, reason))
                continue
            a = arguments(node)
            with calls_before(graph, node) as call:
                mask = self._mask(call, a, made)
                lowered = call(onnx_ops.attention, a["q"], a["k"], a["v"], mask, a["scale"], a["causal"] != "none")
            node.replace_all_uses_with(lowered)
            graph.fx.erase_node(node)
            count += 1
        return count

    def _mask(self, call: Any, a: dict[str, Any], made: dict[str, fx.Node]) -> fx.Node | None:
        windowed = max(a["window"]) >= 0
        if a["key_padding"] is None and a["bias"] is None and not windowed:
            return None
        sizes = [str(sizes_of(value_of(a[name]))[2]) for name in "qk"]
        rule = [a[name] for name in ("key_padding", "bias", "window", "global_tokens", "causal")]
        key = str([*rule, *sizes, value_of(a["q"]).dtype])
        if key not in made:
            made[key] = call(additive_mask, a["q"], a["k"], *rule)
        return made[key]


def additive_mask(
    q: Tensor,
    k: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    window: list[int],
    global_tokens: int,
    causal: str,
) -> Tensor:
    """[B|1, Hq|1, Sq, Sk] of q's dtype: the bias, and half of the least number at what else is hidden."""
    least = torch.finfo(q.dtype).min / 2
    parts = []
    if bias is not None:
        parts.append(finite(bias))
    if max(window) >= 0:
        parts.append(window_bias(q, k, causal, window, global_tokens))
    if key_padding is not None:
        hidden = torch.zeros_like(key_padding, dtype=q.dtype).masked_fill(~key_padding, least)
        parts.append(hidden[:, None, None, :])
    mask = parts[0]
    for part in parts[1:]:
        # Two hidings add up to the least number, which is still finite.
        mask = mask + part
    return mask.expand(-1, -1, q.shape[2], k.shape[2])
