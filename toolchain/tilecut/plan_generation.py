"""What a compile with `generate=True` adds: whether target and model can, the graph with a cache, and what ends a text."""

from __future__ import annotations

from typing import Any

from torch import nn

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import PassRecord, run_passes
from tilecut_runtime.cache_layout import CacheLayout
from tilecut_runtime.errors import ConfigError
from tilecut_targets.target import Target


def check_generation(generate: object, max_length: object, target: Target) -> None:
    """Refuse before the long work what no model could have.

    Raises:
        ConfigError: options of other types, or a target or quantization that has no generation.
    """
    where = "compile_pruned"
    if not isinstance(generate, bool):
        raise ConfigError(where, "generate does not fit", got=repr(generate), wanted="True or False")
    if max_length is not None and (not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2):
        raise ConfigError(
            where, "max_length does not fit", got=repr(max_length), wanted="an integer from 2 on, or None"
        )
    if not generate:
        if max_length is not None:
            raise ConfigError(where, "max_length is the length of what is generated", fix="give generate=True too")
        return
    target.caching()
    if target.needs_data:
        raise ConfigError(
            "quantize",
            f"{target.quantize!r} takes ranges from calibration data, which a model with a cache has no inputs for",
            fix="take another: int4, int8, fp16",
        )


def with_cache(fused: Graph, target: Target, max_length: int | None) -> tuple[Graph, list[PassRecord]]:
    """A fused graph's prefill and decoding graph.

    Raises:
        LoweringError: the model is no decoder that a cache can stand for.
    """
    steps = fused.copy()
    records = run_passes(steps, target.caching(max_length))
    return steps, records


def layout_of(steps: Graph, model: nn.Module) -> CacheLayout:
    """What the manifest says of generation."""
    limits = steps.ranges["capacity"]
    assert limits.max is not None
    return CacheLayout(steps.inputs[0], steps.outputs[0], dict(steps.states), limits.max, eos_of(model))


def eos_of(model: nn.Module) -> tuple[int, ...]:
    """The ids that end a text, of a Hugging Face model's generation config or config; none of others."""
    for name in ("generation_config", "config"):
        found: Any = getattr(getattr(model, name, None), "eos_token_id", None)
        if found is not None:
            return tuple(int(one) for one in (found if isinstance(found, list | tuple) else [found]))
    return ()
