"""The forms that a computation may take in a file for onnxruntime's CPU provider, and the passes that write them.

A *kind* is a computation that a model holds at several places, its sites; a *form* is one way to write it. All forms of a
kind give the same numbers. The first is taken where nothing was measured (`choose_forms.py` measures).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from tilecut_passes.run_passes import Pass
from tilecut_targets.edge.lower_attention import LowerAttention
from tilecut_targets.edge.lower_bias_gelu import LowerBiasGelu
from tilecut_targets.edge.lower_residual import LowerResidual
from tilecut_targets.unpack_attention import UnpackAttention

FORMS: Mapping[str, Mapping[str, tuple[Pass, ...]]] = MappingProxyType(
    {
        "attention": {
            "Attention": (LowerAttention(),),
            "MultiHeadAttention": (LowerAttention(packed=False),),
            "MatMul and Softmax": (),
        },
        # onnxruntime writes SkipLayerNormalization for an Add before a norm when it loads the file.
        "residual": {"Sum": (LowerResidual(),), "Add": ()},
        "gelu": {"BiasGelu": (LowerBiasGelu(),), "Gelu": ()},
    }
)


@dataclass(frozen=True)
class Forms:
    """One form of every kind; the fields are FORMS' keys."""

    attention: str = "Attention"
    residual: str = "Sum"
    gelu: str = "BiasGelu"

    def __post_init__(self) -> None:
        for kind, form in self.as_dict().items():
            assert form in FORMS[kind], f"{kind} has no form {form}"

    def as_dict(self) -> dict[str, str]:
        """Kind -> form."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def passes(self) -> tuple[Pass, ...]:
        """From a fused graph to these forms."""
        return (UnpackAttention(), *(p for kind, form in self.as_dict().items() for p in FORMS[kind][form]))
