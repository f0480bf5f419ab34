"""Lower `tilecut::attention` to CANN's PromptFlashAttention.

Before: tilecut::attention(q, k, v, key_padding). After: npu::NPUPromptFlashAttention in fp16, mask inverted (True
drops), causal written into the mask. Left alone, with the reason in `graph.refusals` (the exporter then writes MatMul
and Softmax): additive biases, windows, soft-caps, ALiBi, dropout, and head widths that are no multiple of 16 or above
512.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tilecut_passes.graph import Graph, Refusal, arguments, calls_before, is_call, value_of
from tilecut_targets.ascend import npu_ops

HEAD_WIDTH_MULTIPLE, HEAD_WIDTH_LIMIT = 16, 512


@dataclass(frozen=True)
class LowerAttention:
    """Every attention within the op's limits becomes one."""

    def match(self, node: fx.Node) -> str | None:
        """Why the op cannot express this attention, or None."""
        a = arguments(node)
        width, value_width = value_of(a["q"]).shape[3], value_of(a["v"]).shape[3]
        if a["dropout_p"]:
            return "dropout"
        if (
            a["bias"] is not None
            or a["alibi_slopes"] is not None
            or a["softcap"]
            or list(a["window"]) != [-1, -1]
            or a["global_tokens"]
        ):
            return "bias, ALiBi, soft-cap, window or global tokens"
        if width != value_width:
            return f"queries are {width} wide and values {value_width}"
        if width % HEAD_WIDTH_MULTIPLE or width > HEAD_WIDTH_LIMIT:
            return f"head width {width}, wanted a multiple of {HEAD_WIDTH_MULTIPLE} up to {HEAD_WIDTH_LIMIT}"
        return None

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of attentions."""
        found = []
        for node in [n for n in graph.nodes if is_call(n, torch.ops.tilecut.attention.default)]:
            if reason := self.match(node):
                graph.refusals.append(Refusal("LowerAttention", node.name, reason))
            else:
                found.append(node)
        # One function can stand for all nodes of a model only when all have the same inputs.
        always_mask = any(arguments(n)["key_padding"] is not None or arguments(n)["causal"] != "none" for n in found)
        for node in found:
            a = arguments(node)
            with calls_before(graph, node) as call:
                lowered = call(
                    npu_ops.prompt_flash_attention,
                    a["q"],
                    a["k"],
                    a["v"],
                    a["key_padding"],
                    scale=a["scale"],
                    causal=a["causal"],
                    always_mask=always_mask,
                )
            node.replace_all_uses_with(lowered)
            graph.fx.erase_node(node)
        return len(found)
