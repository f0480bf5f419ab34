"""The forms that a computation may take in a file for onnxruntime's CPU provider, and the passes that write them.

A *kind* is a computation that a model holds at several places, its sites; a *form* is one way to write it. All forms of a
kind give the same numbers. The first is taken where nothing was measured (`choose_forms.py` measures).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_targets.decompositions import DECOMPOSITIONS
from tilecut_targets.edge import onnx_ops, ort_ops
from tilecut_targets.edge.expand_rotary import expand_rotary
from tilecut_targets.edge.lower_attention import LowerAttention
from tilecut_targets.edge.lower_bias_gelu import LowerBiasGelu
from tilecut_targets.edge.lower_cached_attention import LowerCachedAttention
from tilecut_targets.edge.lower_cross_attention import LowerCrossAttention
from tilecut_targets.edge.lower_residual import LowerResidual
from tilecut_targets.edge.lower_rms_norm import LowerRmsNorm
from tilecut_targets.edge.lower_rotary import LowerRotary
from tilecut_targets.edge.lower_standard_attention import LowerStandardAttention
from tilecut_targets.edge.merge_products import MergeProducts
from tilecut_targets.unpack_attention import UnpackAttention
from tilecut_targets.write_onnx import write_onnx


@dataclass(frozen=True)
class Form:
    """The passes that write a form, and the opset that its ops need."""

    passes: tuple[Pass, ...] = ()
    opset: int = ort_ops.ONNX_OPSET


# In the order in which they are lowered: a residual is found by its norm, layers by their attention, and attention folds
# the heads that rotary embeddings set apart.
FORMS: Mapping[str, Mapping[str, Form]] = MappingProxyType(
    {
        # onnxruntime writes SkipLayerNormalization for an Add before a norm when it loads the file.
        "residual": {"Sum": Form((LowerResidual(),)), "Add": Form()},
        # RMS norms.
        "norm": {"SimplifiedLayerNormalization": Form((LowerRmsNorm(),)), "simpler ops": Form()},
        "rotary": {"RotaryEmbedding": Form((LowerRotary(),)), "simpler ops": Form()},
        # The layers of queries, keys and values that no Attention packs.
        "qkv": {"a product each": Form(), "one product and Split": Form((MergeProducts("qkv"),))},
        # Self-attention whose queries, keys and values are equal layers of one input.
        "attention": {
            "Attention": Form((LowerAttention(packable=True),)),
            "MultiHeadAttention": Form((LowerAttention(packed=False, packable=True),)),
            "Attention of opset 23": Form((LowerStandardAttention(packable=True),), onnx_ops.PORTABLE_OPSET),
            "MatMul and Softmax": Form(),
        },
        # The others: grouped queries, rotary embeddings, biases, two sequences.
        "other_attention": {
            "MultiHeadAttention": Form((LowerAttention(packable=False),)),
            "Attention of opset 23": Form((LowerStandardAttention(packable=False),), onnx_ops.PORTABLE_OPSET),
            "MatMul and Softmax": Form(),
        },
        # The layers of gated activations.
        "gate": {"a product each": Form(), "one product and Split": Form((MergeProducts("gate"),))},
        "gelu": {"BiasGelu": Form((LowerBiasGelu(),)), "Gelu": Form()},
    }
)


@dataclass(frozen=True)
class Forms:
    """One form of every kind; the fields are FORMS' keys."""

    residual: str = "Sum"
    norm: str = "SimplifiedLayerNormalization"
    rotary: str = "RotaryEmbedding"
    qkv: str = "a product each"
    attention: str = "Attention"
    other_attention: str = "MultiHeadAttention"
    gate: str = "a product each"
    gelu: str = "BiasGelu"

    def __post_init__(self) -> None:
        for kind, form in self.as_dict().items():
            assert form in FORMS[kind], f"{kind} has no form {form}"

    def as_dict(self) -> dict[str, str]:
        """Kind -> form."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def _chosen(self) -> list[Form]:
        return [FORMS[kind][form] for kind, form in self.as_dict().items()]

    @property
    def passes(self) -> tuple[Pass, ...]:
        """From a fused graph to these forms."""
        # Attention with a cache has one form, which takes rotary embeddings into the op, and so has that on an encoder's keys.
        cached = (LowerCachedAttention(), LowerCrossAttention())
        return (UnpackAttention(), *cached, *(one for form in self._chosen for one in form.passes))

    @property
    def opset(self) -> int:
        """What a file in these forms needs."""
        return max(form.opset for form in self._chosen)


def write_forms(lowered: Graph, path: Path, forms: Forms) -> ir.Model:
    """A graph that was lowered to `forms` as an ONNX file of the opset that they need.

    Raises:
        LoweringError: an op has no ONNX form.
    """
    # From opset 23 on torch's exporter writes RotaryEmbedding of its own accord.
    return write_onnx(lowered, path, forms.opset, DECOMPOSITIONS, finish=expand_rotary)
