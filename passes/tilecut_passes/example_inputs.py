"""Example inputs for a Hugging Face model, made from its config: what `capture` traces with when the caller gives none.

The main input decides: token ids (with the attention mask and, where the model has more than one type, token types) or
pixels. `use_cache=False` and `return_dict=True` travel along as constants, so that one plain forward is captured.
Which dimensions are dynamic is named here too: `batch`, and `sequence` for text.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tilecut_runtime.errors import CaptureError

BATCH, SEQUENCE = 2, 11

# input name -> dimension -> name of the dynamic size
DynamicDims = dict[str, dict[int, str]]


@dataclass
class ExampleInputs:
    """Keyword tensors, the constants that go with them, and the names of their dynamic dimensions."""

    tensors: dict[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    dynamic: DynamicDims = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)


def inputs_from_config(model: nn.Module) -> ExampleInputs:
    """Make inputs from `model.config`.

    Raises:
        CaptureError: the model has no config, or its main input is of a kind that cannot be made up.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        raise CaptureError(name, "the model has no Hugging Face config to make inputs from", fix="pass example_inputs")
    accepted = inspect.signature(model.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    constants = {k: v for k, v in (("use_cache", False), ("return_dict", True)) if k in accepted}
    generator = torch.Generator().manual_seed(0)

    def ids(batch: int, length: int) -> Tensor:
        return torch.randint(0, text.vocab_size, (batch, length), generator=generator)

    both = {0: "batch", 1: "sequence"}
    if model.main_input_name == "input_ids":
        tensors = {"input_ids": ids(BATCH, SEQUENCE)}
        if "attention_mask" in accepted:
            tensors["attention_mask"] = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
        if "token_type_ids" in accepted and getattr(text, "type_vocab_size", 0) > 1:
            tensors["token_type_ids"] = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        dynamic: DynamicDims = {k: dict(both) for k in tensors}
        if getattr(config, "is_encoder_decoder", False):
            tensors["decoder_input_ids"] = ids(BATCH, SEQUENCE + 2)
            dynamic["decoder_input_ids"] = {0: "batch", 1: "decoder_sequence"}
        limit = getattr(text, "max_position_embeddings", None)
        return ExampleInputs(
            tensors, constants, dynamic, {"sequence": limit} if isinstance(limit, int) and limit > 1 else {}
        )
    if model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(BATCH, vision.num_channels, height, width, generator=generator)
        return ExampleInputs({"pixel_values": pixels}, constants, {"pixel_values": {0: "batch"}})
    raise CaptureError(name, f"cannot make up its main input {model.main_input_name!r}", fix="pass example_inputs")


def inputs_from_caller(model: nn.Module, example: Any, dynamic: DynamicDims | None) -> ExampleInputs:
    """Name the caller's tensors by the parameters of `forward` and guess their dynamic dimensions where not given.

    The guess: dimension 0 is the batch when all tensors agree on it; dimension 1 is the sequence of integer tensors of
    rank 2 and of floating tensors of rank 3, when all of those agree on it.
    """
    name = type(model).__name__
    if isinstance(example, Tensor):
        example = (example,)
    if isinstance(example, dict):
        given = dict(example)
    elif isinstance(example, tuple | list):
        names = list(inspect.signature(model.forward).parameters)
        if len(example) > len(names):
            raise CaptureError(
                name,
                "more example inputs than forward takes",
                got=len(example),
                wanted=f"at most {len(names)} ({', '.join(names)})",
            )
        given = dict(zip(names, example))
    else:
        raise CaptureError(
            name, "example_inputs must be a tensor, a tuple of tensors or a dict of them", got=type(example).__name__
        )
    tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
    constants = {k: v for k, v in given.items() if not isinstance(v, Tensor)}
    if bad := {
        k: type(v).__name__ for k, v in constants.items() if not (v is None or isinstance(v, bool | int | float | str))
    }:
        raise CaptureError(
            name,
            "example inputs must be tensors or plain constants",
            got=", ".join(f"{k}: {t}" for k, t in bad.items()),
        )
    if not tensors:
        raise CaptureError(name, "example_inputs holds no tensor")
    if dynamic is None:
        dynamic = _guess_dynamic(tensors)
    elif unknown := [k for k in dynamic if k not in tensors]:
        raise CaptureError(
            name,
            "dynamic_shapes names an input that example_inputs lacks",
            got=", ".join(unknown),
            wanted=", ".join(tensors),
        )
    else:
        dynamic = {k: _checked_dims(f"{name}: dynamic_shapes of {k}", v, tensors[k]) for k, v in dynamic.items()}
    return ExampleInputs({k: _at_least_two(v, dynamic.get(k, {})) for k, v in tensors.items()}, constants, dynamic)


def _checked_dims(where: str, dims: Any, tensor: Tensor) -> dict[int, str]:
    """Dimension -> name, dimensions counted from the front."""
    if not isinstance(dims, dict):
        raise CaptureError(where, "not a dict of dimension to name", got=type(dims).__name__)
    for dim, size in dims.items():
        if not isinstance(dim, int) or not -tensor.ndim <= dim < tensor.ndim:
            raise CaptureError(where, "no such dimension", got=repr(dim), wanted=f"0 to {tensor.ndim - 1}")
        if not isinstance(size, str) or not size.isidentifier():
            raise CaptureError(where, "a size's name is no identifier", got=repr(size), wanted="e.g. 'batch'")
    return {dim % tensor.ndim: size for dim, size in dims.items()}


def _guess_dynamic(tensors: dict[str, Tensor]) -> DynamicDims:
    dynamic: DynamicDims = {k: {} for k in tensors}
    ranked = {k: v for k, v in tensors.items() if v.ndim > 0}
    if len({v.shape[0] for v in ranked.values()}) == 1:
        for k in ranked:
            dynamic[k][0] = "batch"
    sequences = {k: v for k, v in ranked.items() if v.ndim == (3 if v.is_floating_point() else 2)}
    if len({v.shape[1] for v in sequences.values()}) == 1:
        for k in sequences:
            dynamic[k][1] = "sequence"
    return dynamic


def _at_least_two(tensor: Tensor, dims: dict[int, str]) -> Tensor:
    """torch.export takes sizes 0 and 1 for constants, so a dynamic dimension is traced with at least two."""
    for dim in dims:
        if tensor.shape[dim] == 1:
            tensor = torch.cat([tensor, tensor], dim)
    return tensor
