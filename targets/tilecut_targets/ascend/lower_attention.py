"""Lower `tilecut::attention` to CANN's PromptFlashAttention where the chip's row of the legality table allows it.

Before: tilecut::attention(q, k, v, key_padding, bias, ..). After: npu::NPUPromptFlashAttention in fp16, with the
arguments that `legality.choose` names: causality and windows as sparse modes with the compressed mask, made once; padding
and everything else that hides pairs as one full mask, made once for all attentions that share it. Padding that the model
makes of lengths (arange < lengths) is told by them, as actual_seq_lengths_kv, where nothing else needs a full mask. A bias
of 0 and -inf (a boolean mask of the model's, packed sequences) is a mask. KV heads are repeated where the op takes no groups.
Left alone, with the limit and the nearest legal choice in `graph.refusals` (the exporter then writes MatMul and
Softmax): what `legality.Refused` says. Where the fused op was asked for, that is an error instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tilecut_passes.graph import Graph, Refusal, arguments, calls_before, is_call, size_of, sizes_of, source, value_of
from tilecut_targets.ascend import npu_ops
from tilecut_targets.ascend.legality import AttentionShape, Fused, Refused, choose, op_row
from tilecut_targets.packed_bias import packed_bias, packed_hidden

aten = torch.ops.aten
ZEROS = (aten.zeros_like.default, aten.zeros.default)
TRIANGLE = "npu_triangle"


@dataclass(frozen=True)
class LowerAttention:
    """Every attention within the limits of a family of chips becomes one fused op.

    `required` is the container, "onnx" or "air", in which an attention that has no fused op is an error.
    """

    family: str = "a2"
    required: str | None = None

    def match(self, node: fx.Node) -> Fused | Refused:
        """The op and its arguments, or the limit that the attention breaks."""
        return choose(self.family, attention_shape(node, "float16"), "onnx")

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of attentions.

        Raises:
            LoweringError: an attention without a fused op in the required container.
        """
        masks: dict[str, fx.Node] = {}
        count = 0
        for node in [n for n in graph.nodes if is_call(n, torch.ops.tilecut.attention.default)]:
            found = self.match(node)
            if self.required is not None:
                needed = choose(self.family, attention_shape(node, "float16"), self.required)
                if isinstance(needed, Refused):
                    raise needed.error(node.name)
            if isinstance(found, Refused):
                graph.refusals.append(Refusal("LowerAttention", node.name, str(found)))
                continue
            mask = self._mask(graph, node, found, masks)
            a = arguments(node)
            with calls_before(graph, node) as call:
                lowered = call(
                    npu_ops.prompt_flash_attention,
                    a["q"],
                    a["k"],
                    a["v"],
                    mask,
                    lengths_of(a["key_padding"]) if found.lengths else None,
                    scale=a["scale"],
                    sparse_mode=found.sparse_mode,
                    pre_tokens=found.pre_tokens,
                    next_tokens=found.next_tokens,
                    kv_heads=found.kv_heads,
                    inner_precise=found.inner_precise,
                    expand=found.expand,
                )
            node.replace_all_uses_with(lowered)
            graph.fx.erase_node(node)
            count += 1
        return count

    def _mask(self, graph: Graph, node: fx.Node, found: Fused, masks: dict[str, fx.Node]) -> fx.Node | None:
        """The node of a mask in the form that was chosen; the same mask is made once."""
        if found.mask == "none":
            return None
        if found.mask == "compressed":
            if TRIANGLE not in masks:
                size = op_row(found.op, self.family)["compressed_mask"]
                masks[TRIANGLE] = graph.add_tensor(TRIANGLE, npu_ops.triangle(size))
            return masks[TRIANGLE]
        a = arguments(node)
        rules = {"causal": a["causal"], "window": list(a["window"]), "global_tokens": a["global_tokens"]}
        sizes = [str(sizes_of(value_of(a[name]))[i]) for name, i in (("q", 0), ("q", 2), ("k", 2))]
        key = str([sizes, a["key_padding"], a["bias"], rules])
        if key not in masks:
            with calls_before(graph, node) as call:
                hidden = None if a["bias"] is None else hidden_node(call, a["bias"])
                masks[key] = call(npu_ops.hidden_pairs, a["q"], a["k"], a["key_padding"], hidden, **rules)
        return masks[key]


def attention_shape(node: fx.Node, dtype: str) -> AttentionShape:
    """What the legality table is asked about an attention, were its operands of `dtype`."""
    a = arguments(node)
    q, k, v = (value_of(a[name]) for name in "qkv")
    queries, keys = size_of(q.shape[2]), size_of(k.shape[2])
    masked = a["bias"] is not None and hides_only(a["bias"])
    return AttentionShape(
        dtype=dtype,
        width=int(q.shape[3]),
        value_width=int(v.shape[3]),
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        queries=queries if isinstance(queries, int) else None,
        keys=keys if isinstance(keys, int) else None,
        equal_lengths=queries == keys,
        causal=a["causal"],
        window=(a["window"][0], a["window"][1]),
        global_tokens=a["global_tokens"],
        padding=a["key_padding"] is not None,
        lengths=lengths_of(a["key_padding"]) is not None,
        hidden=masked,
        bias=a["bias"] is not None and not masked,
        slopes=a["alibi_slopes"] is not None,
        softcap=bool(a["softcap"]),
        dropout=bool(a["dropout_p"]),
    )


def lengths_of(padding: fx.Node | None) -> fx.Node | None:
    """The lengths [B] that a key padding [B, Sk] is made of, where it is `arange(Sk) < lengths[:, None]`."""
    if padding is None or not is_call(padding, aten.lt.Tensor, aten.gt.Tensor):
        return None
    places, lengths = padding.args[:2] if is_call(padding, aten.lt.Tensor) else padding.args[1::-1]
    if not (isinstance(places, fx.Node) and isinstance(lengths, fx.Node) and is_call(lengths, aten.unsqueeze.default)):
        return None
    if is_call(places, aten.unsqueeze.default) and value_of(places).shape[0] == 1:
        places = source(places)
    # From 0 in steps of 1.
    counts = is_call(places, aten.arange.default) and len(places.args) == 1 and value_of(places).ndim == 1
    whole = value_of(lengths).ndim == 2 and lengths.args[1] in (1, -1) and not value_of(lengths).is_floating_point()
    return source(lengths) if counts and whole else None


def hides_only(bias: fx.Node) -> bool:
    """Whether a bias is 0 where a pair is seen and minus infinity where not, the same for all heads."""
    if value_of(bias).shape[1] != 1:
        return False
    if is_call(bias, packed_bias):
        return bias.args[4] is None
    if not is_call(bias, aten.masked_fill.Scalar) or not is_call(bias.args[0], *ZEROS):
        return False
    value = bias.args[2]
    return isinstance(value, int | float) and value <= torch.finfo(value_of(bias).dtype).min / 2


def hidden_node(call: Callable[..., fx.Node], bias: fx.Node) -> Any:
    """The bool node of the pairs that such a bias hides."""
    if is_call(bias, packed_bias):
        q, k, of_q, of_k, _, causal, window, global_tokens = bias.args
        return call(packed_hidden, q, k, of_q, of_k, causal, window, global_tokens)
    return source(bias, 1)
