"""What a compile with `generate=True` adds: whether target and model can, the graph with a cache, and what ends a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import PassRecord, run_passes
from tilecut_passes.split_encoder import split_encoder
from tilecut_runtime.cache_layout import MASK, CacheLayout
from tilecut_runtime.errors import ConfigError, LoweringError
from tilecut_runtime.manifest import Signature
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


@dataclass(frozen=True)
class Generation:
    """A model as it generates: what runs for every step, what runs once before (None where there is no encoder), and names."""

    steps: Graph
    encoder: Graph | None
    layout: CacheLayout
    records: list[PassRecord]


def plan_generation(fused: Graph, target: Target, model: nn.Module, max_length: int | None) -> Generation:
    """A fused graph's prefill and decoding graph, and its encoder.

    Raises:
        LoweringError: the model is no decoder that a cache can stand for.
    """
    if fused.hiding:
        raise LoweringError(
            "generate",
            f"in the mask {fused.hiding[0]} what is not 0 hides a token",
            wanted="a mask of real tokens, or none",
            fix="leave it out of the example inputs, or wrap the model and negate it",
        )
    whole = fused.copy()
    records = run_passes(whole, target.before_caching)
    encoder, steps = split_encoder(whole) or (None, whole)
    if encoder is not None and not target.splits:
        raise LoweringError("generate", f"the {target} target writes decoders alone", got="an encoder-decoder", wanted="edge")
    records += run_passes(steps, target.caching(max_length))
    return Generation(steps, encoder, layout_of(steps, model, encoder is not None), records)


def layout_of(steps: Graph, model: nn.Module, encoded: bool) -> CacheLayout:
    """What the manifest says of generation; `encoded`: of an encoder-decoder."""
    limits = steps.ranges["capacity"]
    assert limits.max is not None
    start = ids_of(model, "decoder_start_token_id") if encoded else ()
    stateful = MASK in steps.inputs
    states = {} if stateful else dict(steps.states)
    eos = ids_of(model, "eos_token_id")
    return CacheLayout(steps.inputs[0], steps.outputs[0], states, limits.max, eos, start, stateful)


def signature_of(steps: Graph, layout: CacheLayout) -> Signature:
    """What the deployed model is called with: caches that the runtime holds are no inputs and outputs of it."""
    held = {*steps.states, *steps.states.values()} if layout.stateful else set()
    inputs, outputs = (
        tuple(s for s in specs if s.name not in held) for specs in (steps.input_specs(), steps.output_specs())
    )
    return Signature(inputs, outputs, dict(steps.ranges), steps.returns, steps.table_rows())


def ids_of(model: nn.Module, what: str) -> tuple[int, ...]:
    """Ids, such as those that end a text, of a Hugging Face model's generation config or config; none of others."""
    for name in ("generation_config", "config"):
        found: Any = getattr(getattr(model, name, None), what, None)
        if found is not None:
            return tuple(int(one) for one in (found if isinstance(found, list | tuple) else [found]))
    return ()
