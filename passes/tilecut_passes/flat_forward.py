"""`forward` with flat tensors for arguments: how nested inputs and key-value caches pass through `torch.export`.

A tuple, list or dict of tensors becomes one input a tensor, named by its path. So does a cache object of transformers:

    past_key_values_0_key, past_key_values_0_value, ..             [B, Hk, P, D], a decoder's own past
    past_key_values_0_encoder_key, past_key_values_0_encoder_value [B, Hk, E, D], what it attends to in an encoder

and a cache that forward returns comes out as present_0_key and so on. Caches are told by their shape (`layers` with
`keys` and `values`), so transformers is not imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from tilecut_runtime.errors import CaptureError

PAST, PRESENT = "past_key_values", "present"


@dataclass(frozen=True)
class NestedInput:
    """An argument of forward that holds several tensors: those by flat name, and how the argument is made of them."""

    tensors: dict[str, Tensor]
    build: Callable[[Mapping[str, Tensor]], Any]


def is_cache(value: object) -> bool:
    """Whether it is a key-value cache of transformers."""
    if hasattr(value, "self_attention_cache"):
        return True
    layers = getattr(value, "layers", None)
    return isinstance(layers, list) and hasattr(value, "get_seq_length")


def flatten_cache(cache: Any) -> dict[str, Tensor]:
    """Keys and values by layer: "0_key", "0_value", and "0_encoder_key", .. of a decoder that attends to an encoder."""
    if hasattr(cache, "self_attention_cache"):
        cross = flatten_cache(cache.cross_attention_cache)
        return {
            **flatten_cache(cache.self_attention_cache),
            **{name.replace("_", "_encoder_"): tensor for name, tensor in cross.items()},
        }
    out = {}
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False):
            raise CaptureError(
                PAST, f"layer {i} of the cache keeps a window only", fix="pass a DynamicCache made without a config"
            )
        if layer.keys is not None:
            out |= {f"{i}_key": layer.keys, f"{i}_value": layer.values}
    return out


def nested_input(name: str, value: Any) -> NestedInput | None:
    """How the argument `name` is made of flat tensors; None when it holds anything else."""
    if is_cache(value):
        flat = {f"{name}_{key}": tensor for key, tensor in flatten_cache(value).items()}
        return NestedInput(flat, lambda tensors: _rebuild_cache(value, {k: tensors[k] for k in flat}))
    paths, spec = pytree.tree_flatten_with_path(value)
    if not paths or not all(isinstance(leaf, Tensor) for _, leaf in paths):
        return None
    names = [f"{name}_{path_name(path)}" for path, _ in paths]
    return NestedInput(
        dict(zip(names, (leaf for _, leaf in paths))),
        lambda tensors: pytree.tree_unflatten([tensors[n] for n in names], spec),
    )


def path_name(path: Any) -> str:
    """A pytree path as part of an identifier: parts_1_0."""
    return "_".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _rebuild_cache(like: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A new cache of the same class that holds `tensors`."""
    if hasattr(like, "self_attention_cache"):
        cross = {k: v for k, v in tensors.items() if "_encoder_" in k}
        own = {k: v for k, v in tensors.items() if k not in cross}
        parts = _rebuild_cache(like.self_attention_cache, own), _rebuild_cache(like.cross_attention_cache, cross)
        return type(like)(*parts)
    held = iter(tensors.values())
    return type(like)(ddp_cache_data=list(zip(held, held)))


@contextmanager
def flat_forward(model: nn.Module, nested: Mapping[str, NestedInput], names: list[str]) -> Iterator[None]:
    """Inside, `model.forward` takes the flat arguments `names`, and returns caches as dicts of tensors."""
    original = model.forward

    def forward(**flat: Any) -> Any:
        taken = {name for one in nested.values() for name in one.tensors}
        given = {name: value for name, value in flat.items() if name not in taken}
        out = original(**given, **{name: one.build(flat) for name, one in nested.items()})
        return pytree.tree_map(lambda x: flatten_cache(x) if is_cache(x) else x, out, is_leaf=is_cache)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    held = model.__dict__.get("forward")
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if held is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = held


def states(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> dict[str, str]:
    """Inputs that are caches, each with the output that continues it ("" where none does)."""
    pairs = {}
    for name in inputs:
        if name.startswith(f"{PAST}_"):
            continued = name.replace(PAST, PRESENT, 1)
            pairs[name] = continued if continued in outputs else ""
    return pairs
