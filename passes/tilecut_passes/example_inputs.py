"""Example inputs: made from a Hugging Face model's config, or named and completed where the caller gives them.

From a config: token ids (with the attention mask and, where the model has more than one type, token types), pixels,
both for a model of two towers, log-mel features or a waveform; decoder ids where there is a decoder. `use_cache=False` and
`return_dict=True` travel along as constants, so that one plain forward is captured; `inputs_with_cache` makes the inputs
of a forward with a key-value cache. Which dimensions are dynamic is named here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tilecut_passes.flat_forward import NestedInput, nested_input
from tilecut_runtime.errors import CaptureError
from tilecut_runtime.manifest import DimRange

# Every dynamic size is traced with a number of its own, so that none is taken for another.
BATCH, SEQUENCE, PAST_LENGTH = 2, 11, 5
# Frames of a waveform to trace with: enough for every stride of its convolutions.
FRAMES = 13

# The length of a mask that covers the past and the present.
TOTAL = "total_sequence"
PAST_SEQUENCE = "past_sequence"

# input name -> dimension -> name of the dynamic size
DynamicDims = dict[str, dict[int, str]]


@dataclass
class ExampleInputs:
    """Keyword tensors, the constants that go with them, and the names of their dynamic dimensions.

    `nested` are arguments of forward that hold several of the tensors. `sizes` are what the caller gave of dynamic sizes.
    """

    tensors: dict[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    dynamic: DynamicDims = field(default_factory=dict)
    limits: dict[str, DimRange] = field(default_factory=dict)
    nested: dict[str, NestedInput] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)


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
    main = str(model.main_input_name)
    made = _Maker(config, accepted)
    makers = {
        "input_ids": made.text,
        "pixel_values": made.pixels,
        "input_features": made.features,
        "input_values": made.waveform,
    }
    if main not in makers:
        raise CaptureError(name, f"cannot make up its main input {main!r}", fix="pass example_inputs")
    makers[main]()
    if main != "pixel_values" and "pixel_values" in accepted and hasattr(config, "vision_config"):
        made.pixels(batch="images")
    if getattr(config, "is_encoder_decoder", False):
        made.decoder_ids()
    constants = {k: v for k, v in (("use_cache", False), ("return_dict", True)) if k in accepted}
    return ExampleInputs(made.tensors, constants, made.dynamic, made.limits)


class _Maker:
    """Fills in tensors, dynamic dimensions and limits, one kind of input after another."""

    def __init__(self, config: Any, accepted: Mapping[str, Any]):
        self.config, self.accepted = config, accepted
        self.text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.generator = torch.Generator().manual_seed(0)
        self.tensors: dict[str, Tensor] = {}
        self.dynamic: DynamicDims = {}
        self.limits: dict[str, DimRange] = {}

    def _add(self, name: str, value: Tensor, dims: dict[int, str]) -> None:
        self.tensors[name], self.dynamic[name] = value, dims

    def _ids(self, length: int) -> Tensor:
        return torch.randint(0, self.text_config.vocab_size, (BATCH, length), generator=self.generator)

    def _positions(self, name: str, length: int, *limits: str) -> int:
        """A length that the model has positions for; the limit is kept under the size's name."""
        found = [getattr(self.text_config, one, None) for one in limits]
        limit = next((one for one in found if isinstance(one, int) and one > 1), None)
        if limit is not None:
            self.limits[name] = DimRange(1, limit)
        return length if limit is None else min(length, limit)

    def text(self) -> None:
        """Token ids, their mask and their types."""
        length = self._positions("sequence", SEQUENCE, "max_position_embeddings")
        both = {0: "batch", 1: "sequence"}
        self._add("input_ids", self._ids(length), dict(both))
        if "attention_mask" in self.accepted:
            self._add("attention_mask", torch.ones(BATCH, length, dtype=torch.int64), dict(both))
        if "token_type_ids" in self.accepted and getattr(self.text_config, "type_vocab_size", 0) > 1:
            self._add("token_type_ids", torch.zeros(BATCH, length, dtype=torch.int64), dict(both))

    def decoder_ids(self) -> None:
        """What the decoder has said so far."""
        length = self._positions("decoder_sequence", SEQUENCE + 2, "max_target_positions", "max_position_embeddings")
        self._add("decoder_input_ids", self._ids(length), {0: "batch", 1: "decoder_sequence"})

    def pixels(self, batch: str = "batch") -> None:
        """Images of the config's size; with text beside them their number is another."""
        configs = [getattr(self.config, name, None) for name in ("vision_config", "encoder")]
        vision: Any = next((c for c in [*configs, self.config] if hasattr(c, "image_size")), None)
        if vision is None:
            raise CaptureError(
                type(self.config).__name__, "cannot tell the size of 'pixel_values'", fix="pass example_inputs"
            )
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        count = BATCH if batch == "batch" else BATCH + 1
        pixels = torch.randn(count, vision.num_channels, height, width, generator=self.generator)
        self._add("pixel_values", pixels, {0: batch})

    def features(self) -> None:
        """Log-mel features, as many as the encoder has positions for (its convolutions halve them)."""
        if not all(hasattr(self.config, one) for one in ("num_mel_bins", "max_source_positions")):
            raise CaptureError(
                type(self.config).__name__, "cannot tell the size of 'input_features'", fix="pass example_inputs"
            )
        shape = (BATCH, self.config.num_mel_bins, 2 * self.config.max_source_positions)
        self._add("input_features", torch.randn(shape, generator=self.generator), {0: "batch"})

    def waveform(self) -> None:
        """Samples of sound, or a spectrogram of fixed size."""
        if hasattr(self.config, "conv_stride"):
            samples = 1
            for kernel, stride in zip(reversed(self.config.conv_kernel), reversed(self.config.conv_stride)):
                samples = (samples - 1) * stride + kernel
            samples += (FRAMES - 1) * int(torch.tensor(self.config.conv_stride).prod())
            shape, dims = (BATCH, samples), {0: "batch", 1: "samples"}
        elif all(hasattr(self.config, one) for one in ("max_length", "num_mel_bins")):
            shape, dims = (BATCH, self.config.max_length, self.config.num_mel_bins), {0: "batch"}
        else:
            raise CaptureError(
                type(self.config).__name__, "cannot tell the size of 'input_values'", fix="pass example_inputs"
            )
        self._add("input_values", torch.randn(shape, generator=self.generator), dims)


def inputs_with_cache(model: nn.Module) -> dict[str, Any]:
    """Example inputs of one step of a Hugging Face decoder that continues a key-value cache, made by running the model.

    Decoders: `input_ids` [B, S], `attention_mask` [B, P + S], `past_key_values`. Decoders with an encoder:
    `decoder_input_ids` [B, S], `encoder_outputs`, `attention_mask` [B, E] where there is one, `past_key_values`.

    Raises:
        CaptureError: the model takes no cache.
    """
    # The only caches there are.
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    name = type(model).__name__
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise CaptureError(name, "forward takes no past_key_values", fix="capture it without a cache")
    example = inputs_from_config(model)
    tensors = dict(example.tensors)
    decodes = "decoder_input_ids" in tensors
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if decodes else DynamicCache()
    said = "decoder_input_ids" if decodes else "input_ids"
    ids = tensors.pop(said)
    past, now = ids[:, :PAST_LENGTH], ids[:, PAST_LENGTH:]
    if now.shape[1] < 2:
        raise CaptureError(name, "too few positions for a past and a step", got=ids.shape[1], wanted=PAST_LENGTH + 2)
    masks = {} if decodes else {k: v[:, :PAST_LENGTH] for k, v in tensors.items()}
    with torch.no_grad():
        first = model.eval()(**{**tensors, **masks, said: past}, past_key_values=cache, use_cache=True)
    if decodes:
        tensors.pop(model.main_input_name)  # type: ignore[arg-type]
        tensors["encoder_outputs"] = (first.encoder_last_hidden_state,)  # type: ignore[assignment]
    return {said: now, **tensors, "past_key_values": first.past_key_values, "use_cache": True, "return_dict": True}


def inputs_from_caller(model: nn.Module, example: Any, dynamic: DynamicDims | None) -> ExampleInputs:
    """Name the caller's tensors by the parameters of `forward` and guess their dynamic dimensions where not given.

    The guess: dimension 0 is the batch when all tensors agree on it; dimension 1 is the sequence of integer tensors of
    rank 2 and of floating tensors of rank 3, when all of those agree on it (those called decoder_.. among themselves).
    Of a cache, dimension 2 is the past.
    """
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    given = _by_name(name, example, list(accepted))
    _check_names(name, given, accepted)
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    nested: dict[str, NestedInput] = {}
    for key, value in given.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif value is None or isinstance(value, bool | int | float | str):
            constants[key] = value
        elif (one := nested_input(key, value)) is not None:
            nested[key] = one
            tensors |= one.tensors
        else:
            raise CaptureError(
                name,
                "example inputs must be tensors or plain constants, or structures of tensors",
                got=f"{key}: {type(value).__name__}",
            )
    if not tensors:
        raise CaptureError(name, "example_inputs holds no tensor")
    notes = []
    if "use_cache" in accepted and "use_cache" not in constants and "past_key_values" not in nested:
        constants["use_cache"] = False
        notes.append("capture: use_cache=False; with past_key_values in example_inputs the cache comes in and goes out")
    if dynamic is None:
        dynamic = _guess_dynamic(tensors, nested)
    elif unknown := [k for k in dynamic if k not in tensors]:
        raise CaptureError(
            name,
            "dynamic_shapes names an input that example_inputs lacks",
            got=", ".join(unknown),
            wanted=", ".join(tensors),
        )
    else:
        dynamic = {k: _checked_dims(f"{name}: dynamic_shapes of {k}", v, tensors[k]) for k, v in dynamic.items()}
    sizes = {name: int(v.shape[d]) for k, v in tensors.items() for d, name in dynamic.get(k, {}).items()}
    tensors = {k: _at_least_two(v, dynamic.get(k, {})) for k, v in tensors.items()}
    # torch takes sizes 0 and 1 for constants: what is longer than two dynamic sizes is at least 4.
    limits = {TOTAL: DimRange(4, None)} if any(TOTAL in dims.values() for dims in dynamic.values()) else {}
    return ExampleInputs(tensors, constants, dynamic, limits, nested, notes, sizes)


def _check_names(name: str, given: Mapping[str, Any], accepted: Mapping[str, inspect.Parameter]) -> None:
    kinds = {p.kind for p in accepted.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds and (unknown := [k for k in given if k not in accepted]):
        raise CaptureError(name, "forward has no such input", got=unknown[0], wanted=f"one of {', '.join(accepted)}")
    needed = [k for k, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [k for k in needed if k not in given]:
        raise CaptureError(
            name, f"example_inputs lacks {missing[0]}", got=", ".join(given) or "nothing", wanted=", ".join(needed)
        )


def _by_name(name: str, example: Any, parameters: list[str]) -> dict[str, Any]:
    """The caller's inputs by the names of forward's parameters."""
    if isinstance(example, Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        return dict(example)
    if not isinstance(example, tuple | list):
        raise CaptureError(
            name, "example_inputs must be a tensor, a tuple of tensors or a dict of them", got=type(example).__name__
        )
    if len(example) > len(parameters):
        raise CaptureError(
            name,
            "more example inputs than forward takes",
            got=len(example),
            wanted=f"at most {len(parameters)} ({', '.join(parameters)})",
        )
    return dict(zip(parameters, example))


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


def _guess_dynamic(tensors: dict[str, Tensor], nested: Mapping[str, NestedInput]) -> DynamicDims:
    dynamic: DynamicDims = {k: {} for k in tensors}
    ranked = {k: v for k, v in tensors.items() if v.ndim > 0}
    if len({v.shape[0] for v in ranked.values()}) == 1:
        for k in ranked:
            dynamic[k][0] = "batch"
    past = {k: v for k, v in nested.get("past_key_values", NestedInput({}, dict)).tensors.items() if v.ndim == 4}
    for k in past:
        dynamic[k][2] = "encoder_sequence" if "_encoder_" in k else PAST_SEQUENCE
    sequences = {k: v for k, v in ranked.items() if v.ndim == (3 if v.is_floating_point() else 2)}
    decoder = {k: v for k, v in sequences.items() if k.startswith("decoder_")}
    encoder = {k: v for k, v in sequences.items() if k not in decoder}
    if any("_encoder_" in k for k in past):
        names = ((encoder, "encoder_sequence"), (decoder, "sequence"))
    else:
        names = ((encoder, "sequence"), (decoder, "decoder_sequence" if encoder else "sequence"))
    for group, size in names:
        total = _mask_over_past(group, past)
        if total is not None:
            dynamic[total][1] = TOTAL
        rest = {k: v for k, v in group.items() if k != total}
        if len({v.shape[1] for v in rest.values()}) == 1:
            for k in rest:
                dynamic[k][1] = size
    return dynamic


def _mask_over_past(group: Mapping[str, Tensor], past: Mapping[str, Tensor]) -> str | None:
    """The mask that covers the past and the present, if there is one."""
    lengths = {v.shape[2] for k, v in past.items() if "_encoder_" not in k}
    others = {v.shape[1] for k, v in group.items() if "mask" not in k}
    return next(
        (
            k
            for k, v in group.items()
            if "mask" in k and len(lengths) == 1 and v.shape[1] - next(iter(lengths)) in others
        ),
        None,
    )


def _at_least_two(tensor: Tensor, dims: dict[int, str]) -> Tensor:
    """torch.export takes sizes 0 and 1 for constants, so a dynamic dimension is traced with at least two."""
    for dim in dims:
        if tensor.shape[dim] == 1:
            tensor = torch.cat([tensor, tensor], dim)
    return tensor
