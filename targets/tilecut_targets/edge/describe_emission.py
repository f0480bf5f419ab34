"""What a written model holds for attention, norms, rotary embeddings and activations, and why: facts for the report.

Counted in the file, not in the graph that was to be written: an exporter may know another form.
"""

from __future__ import annotations

from collections.abc import Mapping

# Part of a transformer -> the ops that are forms of it, as ONNX, OpenVINO and ExecuTorch call them.
FORMS = {
    "attention": (
        "Attention", "MultiHeadAttention", "QAttention", "GroupQueryAttention", "ScaledDotProductAttention",
        "Softmax", "_softmax",
    ),
    "norms": (
        "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "SkipLayerNormalization",
        "GroupNormalization", "InstanceNormalization", "MVN", "RMS", "native_layer_norm",
    ),
    "rotary": ("RotaryEmbedding", "RoPE"),
    "activations": (
        "Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Erf", "Relu", "Sigmoid", "Tanh", "Swish", "HardSwish", "gelu", "relu",
        "sigmoid", "tanh",
    ),
}  # fmt: skip
NONE = "no op of its own: absent, or written out in simpler ops"


def describe_emission(counts: Mapping[str, int], why: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Per part of a transformer the ops of the file that are forms of it, with their number, and the reason.

    Args:
        counts: how many nodes of each op the file holds; a word before an op's name says who runs it.
        why: part -> the reason for its form.
    """
    found = {part: {op: n for op, n in counts.items() if op.split()[-1] in forms} for part, forms in FORMS.items()}
    return {part: {"ops": ops or NONE, "why": why[part]} for part, ops in found.items()}
