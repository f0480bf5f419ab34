"""tilecut's own ops in plain ones, for exporters that know neither: what `write_onnx` and `run_decompositions` are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from tilecut_targets.decompose_attention import decomposed_attention
from tilecut_targets.decompose_norms import decomposed_rotary

DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        torch.ops.tilecut.attention.default: decomposed_attention,
        torch.ops.tilecut.rotary.default: decomposed_rotary,
    }
)
