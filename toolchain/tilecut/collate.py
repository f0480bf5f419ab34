"""Examples of different lengths as one batch for training: padded to the longest, or packed without padding.

    from functools import partial
    from tilecut import pack, pad_to_longest

    DataLoader(examples, 32, collate_fn=pad_to_longest)
    DataLoader(examples, 32, collate_fn=pack)  # model(**batch) of a Hugging Face model
    DataLoader(examples, 32, collate_fn=partial(pack, bounds="tilecut"))  # a model on tilecut.attention_varlen

An example is a mapping. Its one-dimensional fields (lists, arrays, tensors: `input_ids`, `labels`, `token_type_ids`, ..)
belong to its tokens and have one length; a number (a label of the whole text) belongs to the example. All examples have
the same fields and at least one token each.

    field               pad_to_longest [B, S]       pack [1, T]
    input_ids           padded with pad_id          end to end
    attention_mask      made where it is missing    left out: nothing is padding
    labels, per token   padded with -100            end to end, the first of every example -100
    position_ids        padded with 0               made where they are missing: they start again in every example
    other, per token    padded with 0               end to end
    numbers             [B]                         [N]

The loss of a causal language model pairs the output at a token with the label of the *next* one. Packed, the last token
of an example would be asked for the first of its neighbour; the -100 there takes out this pair and no other, since no
token within the example is asked for its first. transformers' `DataCollatorWithFlattening` does the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tilecut_runtime.errors import ConfigError, InputError

IGNORED = -100
BOUNDS = ("transformers", "tilecut", None)

Example = Mapping[str, Any]


def pad_to_longest(
    examples: Sequence[Example],
    *,
    pad_id: int = 0,
    multiple_of: int = 1,
    side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """A padded batch, with its `attention_mask`.

    Args:
        pad_id: the id that pads `input_ids`.
        multiple_of: S is the longest length, rounded up to a multiple of it.
        side: where the padding goes.

    Returns:
        Fields of tokens [B, S], numbers [B]; integers are int64.

    Raises:
        InputError: no examples, or examples that do not fit each other.
        ConfigError: an option that cannot be honoured.
    """
    where = "pad_to_longest"
    _check_positive(where, multiple_of=multiple_of)
    _check_id(where, "pad_id", pad_id)
    if side not in ("right", "left"):
        raise ConfigError(where, "no such side", got=repr(side), wanted='"right" or "left"')
    rows, lengths = _read(where, examples)
    if "attention_mask" not in rows[0]:
        rows = [{**row, "attention_mask": torch.ones(n, dtype=torch.int64)} for row, n in zip(rows, lengths)]
    length = _round_up(max(lengths), multiple_of)
    batch = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if parts[0].ndim == 0:
            batch[name] = torch.stack(parts)
            continue
        whole = parts[0].new_full((len(parts), length), _filler(name, pad_id))
        for row, part in zip(whole, parts):
            row[slice(length - len(part), None) if side == "left" else slice(len(part))] = part
        batch[name] = whole
    return batch


def pack(
    examples: Sequence[Example],
    *,
    bounds: Literal["transformers", "tilecut"] | None = "transformers",
    total: int | None = None,
    multiple_of: int = 1,
    pad_id: int = 0,
    first_position: int = 0,
    next_token: bool = True,
) -> dict[str, Any]:
    """A batch of one row, the examples one after another, and where each begins.

    Args:
        bounds: the names under which the boundaries are given. "transformers": the arguments that its models hand on to
            their attention (`cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`), and `use_cache=False`: a
            model with a cache does not look for new starts in `position_ids`, and its "eager" and "sdpa" attention
            would see across. "tilecut": `cu_seqlens` int32 [N + 1] and `max_length`. None: neither.
        total: T is this many tokens; multiple_of: else T is rounded up to a multiple. What is missing is padding, in
            sequences of its own that are no longer than the longest example, so that neither the positions nor the
            longest length grow by it.
        pad_id: the id of that padding.
        first_position: the position of an example's first token; RoBERTa and its like start at 2.
        next_token: labels are for the next token (causal language models); False keeps the first label of every example.

    Returns:
        Fields of tokens [1, T], numbers [N]; integers are int64 but for the boundaries.

    Raises:
        InputError: no examples, examples that do not fit each other, hold padding, or are longer than `total`.
        ConfigError: an option that cannot be honoured.
    """
    where = "pack"
    _check_positive(where, multiple_of=multiple_of, **({} if total is None else {"total": total}))
    _check_id(where, "pad_id", pad_id)
    _check_id(where, "first_position", first_position)
    if bounds not in BOUNDS:
        raise ConfigError(where, "no such bounds", got=repr(bounds), wanted='"transformers", "tilecut" or None')
    rows, lengths = _read(where, examples)
    rows = [_without_mask(row, i) for i, row in enumerate(rows)]
    fillers = _padding_lengths(sum(lengths), max(lengths), total, multiple_of)

    batch: dict[str, Any] = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if parts[0].ndim == 0:
            batch[name] = torch.stack(parts)
            continue
        whole = torch.cat([*parts, parts[0].new_full((sum(fillers),), _filler(name, pad_id))])
        if name == "labels" and next_token:
            whole[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = IGNORED
        batch[name] = whole[None]

    counted = [torch.arange(first_position, first_position + n) for n in (*lengths, *fillers)]
    if "position_ids" not in batch:
        batch["position_ids"] = torch.cat(counted)[None]
    elif fillers:
        batch["position_ids"][0, sum(lengths) :] = torch.cat(counted[len(lengths) :])
    return batch | _bounds([*lengths, *fillers], bounds)


def _bounds(lengths: Sequence[int], names: str | None) -> dict[str, Any]:
    """The boundaries of sequences under the names that are asked for."""
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    if names == "tilecut":
        return {"cu_seqlens": cu_seqlens, "max_length": longest}
    if names == "transformers":
        both = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        return {**both, "max_length_q": longest, "max_length_k": longest, "use_cache": False}
    return {}


def _padding_lengths(tokens: int, longest: int, total: int | None, multiple_of: int) -> list[int]:
    """The lengths of the sequences that fill a row up."""
    wanted = _round_up(tokens, multiple_of) if total is None else total
    if wanted < tokens:
        raise InputError("pack", "the examples have more tokens than total", got=tokens, wanted=f"at most {wanted}")
    if wanted % multiple_of:
        raise ConfigError("pack", "total is no multiple of multiple_of", got=f"{wanted} and {multiple_of}")
    whole, rest = divmod(wanted - tokens, longest)
    return [longest] * whole + ([rest] if rest else [])


def _read(where: str, examples: Sequence[Example]) -> tuple[list[dict[str, Tensor]], list[int]]:
    """The examples as tensors, checked against each other, and the tokens of each."""
    if not isinstance(examples, Sequence):
        raise InputError(where, "not a list of examples", got=type(examples).__name__)
    if not examples:
        raise InputError(where, "the batch has no examples")
    rows, lengths = [], []
    for i, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise InputError(
                f"{where}: example {i}", "not a mapping", got=type(example).__name__, wanted="a dict of fields"
            )
        if odd := next((name for name in example if not isinstance(name, str)), None):
            raise InputError(f"{where}: example {i}", "a field whose name is no text", got=repr(odd))
        rows.append({name: _tensor(f"{where}: example {i}: {name}", value) for name, value in example.items()})
        if rows[i].keys() != rows[0].keys():
            raise InputError(
                f"{where}: example {i}", "other fields than example 0", got=sorted(rows[i]), wanted=sorted(rows[0])
            )
        if odd := next((name for name, x in rows[i].items() if x.ndim != rows[0][name].ndim), None):
            raise InputError(f"{where}: example {i}: {odd}", "a number in one example and a row in another")
        sizes = {name: len(x) for name, x in rows[i].items() if x.ndim}
        if len(set(sizes.values())) != 1:
            raise InputError(
                f"{where}: example {i}",
                "its fields differ in length",
                got=sizes or "no field of tokens",
                wanted="one length",
            )
        lengths.append(next(iter(sizes.values())))
        if not lengths[i]:
            raise InputError(f"{where}: example {i}", "it has no tokens", fix="leave it out of the batch")
    for name in rows[0]:
        # Integers in one example and floats in another would lose their fractions.
        dtype = functools.reduce(torch.promote_types, (row[name].dtype for row in rows))
        for row in rows:
            row[name] = row[name].to(dtype)
    return rows, lengths


def _tensor(where: str, value: Any) -> Tensor:
    try:
        x = torch.as_tensor(value).detach()
    # torch raises one or the other for objects, ragged lists, dtypes that it lacks and numbers too large.
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise InputError(where, "no tensor can be made of it", got=type(value).__name__) from e
    if x.ndim > 1:
        raise InputError(where, "too many dimensions", got=list(x.shape), wanted="a number or one dimension")
    if x.is_complex() or x.dtype == torch.uint64 or x.layout != torch.strided or x.is_meta:
        raise InputError(where, "no batch can be made of it", got=f"{x.dtype} {x.layout} on {x.device}")
    if x.is_floating_point() and x.numel() and where.endswith((": input_ids", ": attention_mask", ": position_ids")):
        raise InputError(where, "not integers", got=x.dtype)
    if x.dtype == torch.bool and where.endswith(": labels"):
        # Else -100 would become True.
        x = x.to(torch.int64)
    whole = x.dtype != torch.bool and not x.is_floating_point()
    return x.to(torch.int64) if whole or where.endswith(": attention_mask") or not x.numel() else x


def _without_mask(row: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """An example whose mask, if it has one, says that all is visible."""
    mask = row.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise InputError(f"pack: example {index}", "it holds padding", fix="pack the tokens alone, before padding")
    return {name: x for name, x in row.items() if name != "attention_mask"}


def _filler(name: str, pad_id: int) -> int:
    return {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_positive(where: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if not hasattr(value, "__index__") or isinstance(value, bool) or value < 1:
            raise ConfigError(where, f"{name} is not a positive integer", got=repr(value))


def _check_id(where: str, name: str, value: int) -> None:
    if not hasattr(value, "__index__") or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ConfigError(where, f"{name} is no integer of 64 bits", got=repr(value))
