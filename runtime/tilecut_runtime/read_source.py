"""What an encoder-decoder is asked to read, as the inputs of its encoder; and what the encoder makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tilecut_runtime.errors import InputError
from tilecut_runtime.manifest import TensorSpec
from tilecut_runtime.token_rows import rows_of

if TYPE_CHECKING:
    from tilecut_runtime.session import Session

WHERE = "Session.generate"


def read_source(encoder: Session, given: Any, attention_mask: Any) -> dict[str, np.ndarray]:
    """The encoder's outputs for token ids, rows of unequal lengths padded on the right, or for its inputs by name.

    Args:
        given: ids [B, S] or [S], or rows of them, where the encoder takes ids; the array itself where it has one input; or
            arrays by name. A mask that is not given says that all is real.

    Raises:
        InputError: it does not fit the encoder.
    """
    masks = [spec for spec in encoder.inputs if "mask" in spec.name]
    others = [spec for spec in encoder.inputs if spec not in masks]
    if isinstance(given, Mapping):
        inputs = {name: _array(name, value, encoder.inputs) for name, value in given.items()}
        if attention_mask is not None:
            raise InputError(WHERE, "inputs by name hold their own mask", got="attention_mask", fix="put it among them")
    elif len(others) != 1:
        raise InputError(
            WHERE,
            "the encoder has several inputs",
            got=type(given).__name__,
            wanted="a dict of " + ", ".join(spec.name for spec in encoder.inputs),
        )
    elif _takes_ids(others[0]):
        inputs = _padded(given, attention_mask, others[0], masks)
    elif attention_mask is not None and not masks:
        raise InputError(WHERE, "the encoder has no mask", got="attention_mask")
    else:
        inputs = {others[0].name: given, **({masks[0].name: attention_mask} if attention_mask is not None else {})}
    for spec in masks:
        if spec.name not in inputs:
            shaped = next((o for o in others if o.shape[: len(spec.shape)] == spec.shape and o.name in inputs), None)
            if shaped is not None:
                inputs[spec.name] = np.ones(np.shape(inputs[shaped.name])[: len(spec.shape)], spec.dtype)
    # The manifest may not say how many ids there are: of an earlier version.
    for spec in others:
        ids = inputs.get(spec.name)
        if _takes_ids(spec) and isinstance(ids, np.ndarray) and ids.dtype.kind == "i" and ids.size and ids.min() < 0:
            raise InputError(WHERE, f"{spec.name} holds an unknown token id", got=int(ids.min()), wanted="0 and above")
    return encoder.run(inputs)


def _array(name: str, value: Any, specs: Sequence[TensorSpec]) -> Any:
    """Lists, such as a tokenizer gives, as an array; all else as it is."""
    dtype = next((spec.dtype for spec in specs if spec.name == name), None)
    if not isinstance(value, list | tuple) or dtype is None:
        return value
    try:
        found = np.asarray(value)
    # Words of numpy's for rows of unequal lengths, of torch's for tensors that numpy has no form for.
    except (ValueError, TypeError, RuntimeError) as e:
        raise InputError(WHERE, f"{name} is no array ({e})", wanted=f"{dtype}, rows of one length", fix="pad them") from e
    return found.astype(dtype) if np.can_cast(found.dtype, dtype, "same_kind") else found


def reads_ids(encoder: Session) -> bool:
    """Whether an encoder reads token ids."""
    return any(_takes_ids(spec) for spec in encoder.inputs if "mask" not in spec.name)


def _takes_ids(spec: TensorSpec) -> bool:
    return len(spec.shape) == 2 and spec.dtype in ("int64", "int32")


def _padded(given: Any, attention_mask: Any, spec: TensorSpec, masks: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Ids and their mask."""
    rows = rows_of(given, attention_mask, spec.name)
    if not rows or not all(len(row) for row in rows):
        raise InputError(WHERE, f"{spec.name} holds an empty text", wanted="one row at least, of one token at least")
    lengths = np.array([len(row) for row in rows])
    if len(set(lengths)) > 1 and not masks:
        raise InputError(
            WHERE,
            "the encoder has no mask that would hide padding",
            got=f"rows of {lengths.min()} to {lengths.max()} tokens",
            wanted="rows of one length",
        )
    ids = np.zeros((len(rows), lengths.max()), spec.dtype)
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = tokens
    return {spec.name: ids, **{mask.name: (np.arange(ids.shape[1]) < lengths[:, None]).astype(mask.dtype) for mask in masks}}
