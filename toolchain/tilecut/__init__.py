"""tilecut: cut transformers to the tiles of the kernels they will run on.

    from tilecut import compile_pruned, load

    artifact = compile_pruned(model, target="edge", calibration="texts.tsv", config="hybrid")
    session = load(artifact.path)
    outputs = session.run({"input_ids": ..., "attention_mask": ...})

Names are imported when first used: `load` and sessions need numpy and the target's runtime, not torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "compile_pruned": "tilecut.compile",
    "load": "tilecut_runtime.session",
    "from_pretrained": "tilecut.pretrained",
    "PruneConfig": "tilecut.config",
    "Recovery": "tilecut.recovery_config",
    "Artifact": "tilecut.artifact",
    "attention": "tilecut_runtime.attention",
    "attention_varlen": "tilecut_runtime.attention_varlen",
    "register_attention": "tilecut.transformers_attention",
    "pack": "tilecut.collate",
    "pad_to_longest": "tilecut.collate",
    "LengthBucketSampler": "tilecut.sample_by_length",
    "TilecutError": "tilecut_runtime.errors",
}

__all__ = [
    "Artifact",
    "LengthBucketSampler",
    "PruneConfig",
    "Recovery",
    "TilecutError",
    "__version__",
    "attention",
    "attention_varlen",
    "compile_pruned",
    "from_pretrained",
    "load",
    "pack",
    "pad_to_longest",
    "register_attention",
]

if TYPE_CHECKING:
    from tilecut.artifact import Artifact
    from tilecut.collate import pack, pad_to_longest
    from tilecut.compile import compile_pruned
    from tilecut.config import PruneConfig
    from tilecut.pretrained import from_pretrained
    from tilecut.recovery_config import Recovery
    from tilecut.sample_by_length import LengthBucketSampler
    from tilecut.transformers_attention import register_attention
    from tilecut_runtime.attention import attention
    from tilecut_runtime.attention_varlen import attention_varlen
    from tilecut_runtime.errors import TilecutError
    from tilecut_runtime.session import load


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tilecut' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("tilecut"):
            raise
        raise ModuleNotFoundError(
            f"tilecut.{name} needs {e.name}, which is not installed: pip install 'tilecut[compile]'", name=e.name
        ) from e


def __dir__() -> list[str]:
    return __all__
