"""Give a model with a cache the inputs that onnxruntime-genai fills: one mask instead of two lengths a row.

Before: tokens [B, S], past_lengths [B], lengths [B], past keys and values -> logits [B, 1, V], present keys and values.
After: input_ids [B, S], attention_mask [B, P + S], past keys and values -> the same, `logits` by this name.
The mask has a 1 for every real token, those in the cache first; rows are padded on the right, as genai pads them. Then
    past_lengths = sum(attention_mask[:, :P]), lengths = sum(attention_mask[:, P:])
and GroupQueryAttention's total is P + S: caches that are not shared by past and present have so many places in genai,
whatever the rows hold.
Left alone: all else, weights included.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from tilecut_runtime.cache_layout import LENGTHS, PAST_LENGTHS, CacheLayout

TOKENS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
ATTENTION, TOTAL = "GroupQueryAttention", 6


def count_by_mask(model: ir.Model, layout: CacheLayout) -> int:
    """Rewrite in place; returns the number of attentions."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    tokens = inputs[layout.tokens]
    mask = ir.val(MASK, ir.DataType.INT64, ["batch", "total_sequence"])
    tape = Tape(graph)
    zero, one = (tape.initializer(ir.tensor(np.array([n])), f"{MASK}_{n}") for n in (0, 1))
    step, total = (tape.op("Shape", [value], {"start": 1, "end": 2}) for value in (tokens, mask))
    past = tape.op("Sub", [total, step])
    for name, start, end in ((PAST_LENGTHS, zero, past), (LENGTHS, past, total)):
        part = tape.op("Slice", [mask, start, end, one])
        inputs[name].replace_all_uses_with(tape.op("ReduceSum", [part, one], {"keepdims": 0}))
        graph.inputs.remove(inputs[name])
    places = tape.op("Cast", [tape.op("Squeeze", [total])], {"to": ir.DataType.INT32})
    graph.insert_before(graph[0], tape.nodes)
    graph.inputs.insert(graph.inputs.index(tokens) + 1, mask)
    attentions = [node for node in graph if node.op_type == ATTENTION]
    for node in attentions:
        node.replace_input_with(TOTAL, places)
    # Whatever inside has one of these names gets another: those of inputs and outputs stay.
    tokens.name = TOKENS
    next(value for value in graph.outputs if value.name == layout.logits).name = LOGITS
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)
    return len(attentions)
