"""`attn_implementation="tilecut"`: Hugging Face models train and run on `tilecut::attention`, unchanged.

    import tilecut
    tilecut.register_attention()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="tilecut")

transformers asks two functions: one makes the mask once a forward, the other attends once a layer.

    mask of transformers                          becomes
    causal, sliding window, bidirectional,        `Visibility`, passed through the model in the mask's place: rules and
    each with or without 2D padding               bool [B, Sk], no [Sq, Sk] tensor
    packed `position_ids` (numbers start again)   the same with the bounds of the sequences: `attention_varlen`
    `cu_seq_lens_q` and its like as arguments     `attention_varlen`, whatever the mask
    any other (chunks, blocks, custom functions,  the additive tensor that `eager` adds, as a bias
    static caches, 4D masks of the caller)

Under torch.compile the bounds cannot be read off `position_ids`: the packed mask stays a tensor there, unless the
arguments bring the bounds (`DataCollatorWithFlattening(return_flash_attn_kwargs=True)` does). Grouped queries are not
repeated; scale, soft-cap, dropout and position bias are the module's. A query that sees no key gives 0, where `eager`
gives the mean of the values.

Written against transformers 5.23; the first releases of 5 made masks from `cache_position`, and are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, eager_mask

from tilecut_runtime.attention import attention
from tilecut_runtime.attention_varlen import attention_varlen
from tilecut_runtime.errors import ConfigError, InputError

NAME = "tilecut"
# Arguments of some models that change the result, and that the op has no equal of.
UNKNOWN = ("s_aux", "sinks", "block_indices", "cache")


class Segments(NamedTuple):
    """Sequences that lie one after another in a batch's rows, in the words of `tilecut::attention_varlen`."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int


class Visibility(NamedTuple):
    """What a mask means, in the words of `tilecut::attention`; stands in the mask's place between two layers."""

    causal: str
    window: tuple[int, int]
    key_padding: Tensor | None
    keys: int
    segments: Segments | None = None


def register_attention() -> None:
    """Make `attn_implementation="tilecut"` known to transformers; a second call changes nothing.

    Raises:
        ConfigError: transformers is too old.
    """
    if "q_length" not in inspect.signature(eager_mask).parameters:
        raise ConfigError(
            "tilecut.register_attention",
            "transformers is too old: it makes masks from cache_position",
            got=transformers.__version__,
            wanted="a version that makes them from q_length, as 5.23 does",
        )
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Visibility | Tensor | None:
    """The mask of one forward, called by transformers.

    Args:
        batch_size, q_length, kv_length: of the attention.
        q_offset, kv_offset: the positions of the first query and the first key; a tensor with a static cache.
        mask_function: (batch, head, query, key) -> visible.
        attention_mask: bool [B, kv_offset + Sk], True on a real token; or None.
        local_size: the window or chunk that `mask_function` has.
        allow_is_causal_skip: `mask_function` is causal, within `local_size` where there is one, and nothing else.
        allow_is_bidirectional_skip: the same of one that looks both ways.
        config: of the model.

    Returns:
        A `Visibility`; an additive mask [B, 1, Sq, Sk] where none is equal; None where all is visible.
    """
    # None where the reading of `mask_function` by its flags would be a guess.
    shift = None if isinstance(q_offset, Tensor) else q_offset - kv_offset
    chunked = local_size is not None and getattr(config, "attention_chunk_size", None) is not None
    if shift is not None and not chunked:
        key_padding = None if attention_mask is None else _padding(attention_mask, kv_offset, kv_length)
        segments = None
        if not allow_is_causal_skip and not allow_is_bidirectional_skip and attention_mask is None:
            segments = _segments(mask_function, local_size)
        if allow_is_causal_skip or segments is not None:
            causal = _corner(shift, kv_length - q_length)
            if causal is not None:
                window = (-1, -1) if local_size is None else (local_size - 1, -1)
                return Visibility(causal, window, key_padding, kv_length, segments)
        elif allow_is_bidirectional_skip and local_size is None:
            return None if key_padding is None else Visibility("none", (-1, -1), key_padding, kv_length)
        elif allow_is_bidirectional_skip and local_size is not None and shift == kv_length - q_length:
            return Visibility("none", (local_size, local_size), key_padding, kv_length)
    return eager_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # pyright: ignore[reportArgumentType]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _corner(shift: int, lower_right: int) -> str | None:
    """The `causal` of the op whose diagonal is moved right by `shift`."""
    return "top_left" if shift == 0 else "bottom_right" if shift == lower_right else None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visibility | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, called by transformers.

    Args:
        module: the layer; its `is_causal` counts where there is no mask.
        query: [B, Hq, Sq, D]; key: [B, Hk, Sk, D]; value: [B, Hk, Sk, E].
        attention_mask: what `make_mask` gave, or a mask of the caller: additive, or bool with True on the visible.
        dropout, scaling, softcap: the layer's; None is none, of the scale D ** -0.5.
        sliding_window: the layer's, which counts only where `cu_seq_lens_q` comes without a `Visibility`.
        is_causal: overrides the module's.
        position_bias: added to the scores, [B|1, Hq|1, Sq, Sk].

    Returns:
        [B, Sq, Hq, E], and None in the place of the weights.

    Raises:
        InputError: weights are asked for, or an argument has no equal here.
    """
    _refuse(kwargs)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "dropout_p": dropout}
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if kwargs.get("cu_seq_lens_q") is not None:
        rules = _given_rules(attention_mask, causal, sliding_window)
        return _packed(query, key, value, _given_segments(kwargs), position_bias, **rules, **options), None
    bias, key_padding = position_bias, None
    if isinstance(attention_mask, Visibility):
        if attention_mask.keys != key.shape[2]:
            raise InputError(
                "tilecut.register_attention",
                "the mask is not of these keys",
                got=attention_mask.keys,
                wanted=key.shape[2],
            )
        options |= {"causal": attention_mask.causal, "window": attention_mask.window}
        if attention_mask.segments is not None:
            return _packed(query, key, value, attention_mask.segments, position_bias, **options), None
        key_padding = attention_mask.key_padding
    elif attention_mask is not None:
        mask = _additive(attention_mask, query)
        bias = mask if bias is None else bias + mask
    elif causal and query.shape[2] > 1:
        options["causal"] = "top_left"
    return attention(query, key, value, key_padding, bias, **options).transpose(1, 2), None


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise InputError(
            "tilecut.register_attention",
            "the attention weights are never made",
            got="output_attentions=True",
            fix='load the model with attn_implementation="eager"',
        )
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            raise InputError(
                "tilecut.register_attention",
                f"the model passes {name}, which tilecut::attention has no equal of",
                fix='load the model with attn_implementation="eager"',
            )


def _padding(attention_mask: Tensor, kv_offset: int, kv_length: int) -> Tensor:
    """The padding of the keys that are attended to; a key beyond the mask is no token."""
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    if mask.ndim != 4:
        raise InputError(
            "tilecut.register_attention", "the mask has the wrong rank", got=list(mask.shape), wanted="[B, H|1, Sq, Sk]"
        )
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))


def _given_rules(mask: Visibility | Tensor | None, causal: bool, sliding_window: int | None) -> dict[str, Any]:
    """How the packed sequences of the caller are masked: as the model's own mask is, or as its arguments say."""
    if isinstance(mask, Visibility):
        if mask.key_padding is not None:
            raise InputError(
                "tilecut.register_attention",
                "packed sequences have no padding",
                got="attention_mask and cu_seq_lens_q",
                fix="leave one of them out",
            )
        return {"causal": "bottom_right" if mask.causal != "none" else "none", "window": mask.window}
    width = -1 if sliding_window is None else sliding_window - 1
    return {"causal": "bottom_right" if causal else "none", "window": (width, -1 if causal else width)}


def _given_segments(kwargs: dict[str, Any]) -> Segments:
    """The sequences that the caller's arguments bound, as transformers' flash attention takes them."""
    cu_q, cu_k = (kwargs[name].to(torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    return Segments(cu_q, cu_k, int(kwargs["max_length_q"]), int(kwargs["max_length_k"]))


def _packed(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, position_bias: Tensor | None, **options: Any
) -> Tensor:
    """Attention between the sequences of a batch's rows, laid end to end."""
    if position_bias is not None:
        raise InputError("tilecut.register_attention", "packed sequences take no position_bias")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out, _ = attention_varlen(q, k, v, **segments._asdict(), **options)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _segments(mask_function: Callable, local_size: int | None) -> Segments | None:
    """The sequences of a packed causal mask, or None for any other.

    transformers says nowhere but in the closures of `mask_function` what it is made of; one that is made in any other
    way is not recognised, and becomes a tensor.
    """
    if torch.compiler.is_compiling():
        return None
    parts = _closure(mask_function, "and_masks", "mask_functions", ())
    if len(parts) != 2:
        return None
    numbers = _closure(parts[0], "packed_sequence_mask_function", "packed_sequence_mask")
    within = _closure(parts[1], "remap_positions_for_packed_sequence", "mask_function")
    if local_size is not None:
        banded = _closure(within, "and_masks", "mask_functions", ())
        if len(banded) != 2 or _closure(banded[0], "sliding_window_overlay", "sliding_window") != local_size:
            return None
        within = banded[1]
    if numbers is None or within is not causal_mask_function:
        return None
    # A sequence ends where its number changes, and at the end of every row.
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers.diff(dim=1) != 0
    first = starts.flatten().nonzero().flatten()
    bounds = torch.cat([first, first.new_tensor([numbers.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return Segments(bounds, bounds, longest, longest)


def _closure(function: Any, maker: str, name: str, otherwise: Any = None) -> Any:
    """The variable `name` that `function`, made by transformers' `maker`, closes over."""
    code = getattr(function, "__code__", None)
    if code is None or not function.__qualname__.startswith(f"{maker}.<locals>.") or name not in code.co_freevars:
        return otherwise
    return function.__closure__[code.co_freevars.index(name)].cell_contents
