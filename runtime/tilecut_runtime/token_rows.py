"""Token ids as callers give them, arrays, lists, rows of unequal lengths, as rows without padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilecut_runtime.errors import InputError

WHERE = "Session.generate"


def rows_of(input_ids: Any, attention_mask: Any, name: str = "input_ids") -> list[np.ndarray]:
    """The real ids of every row, int64; `name` is what the caller calls them.

    Raises:
        InputError: they are no ids, or the mask does not fit them.
    """
    ragged = isinstance(input_ids, list | tuple) and any(
        isinstance(row, list | tuple | np.ndarray) for row in input_ids
    )
    if ragged and attention_mask is None:
        return [_ids(row, 1, name) for row in input_ids]
    if ragged and len({np.size(row) for row in input_ids}) > 1:
        raise InputError(
            WHERE,
            f"rows of unequal lengths in {name} hold no padding that attention_mask could tell",
            got=f"{min(map(np.size, input_ids))} to {max(map(np.size, input_ids))} ids",
            fix="leave attention_mask out, or pad the rows",
        )
    ids = _ids(input_ids, 2, name)
    if attention_mask is None:
        return list(ids)
    try:
        mask = np.atleast_2d(np.asarray(attention_mask))
    # Words of numpy's for rows of unequal lengths, of torch's for tensors that it has no form for.
    except (ValueError, TypeError, RuntimeError) as e:
        raise InputError(WHERE, f"attention_mask is no array ({e})", wanted=f"integers {list(ids.shape)}") from e
    if mask.shape != ids.shape or mask.dtype.kind not in "biu":
        raise InputError(
            WHERE,
            f"attention_mask does not fit {name}",
            got=f"{mask.dtype} {list(mask.shape)}",
            wanted=f"integers {list(ids.shape)}",
        )
    if odd := sorted(set(np.unique(mask).tolist()) - {0, 1}):
        raise InputError(WHERE, "attention_mask says something else than real or not", got=odd[0], wanted="0 and 1")
    found = []
    for row, (tokens, real) in enumerate(zip(ids, mask != 0)):
        places = np.flatnonzero(real)
        if len(places) and places[-1] - places[0] + 1 != len(places):
            raise InputError(
                WHERE, f"row {row} of attention_mask has padding between its tokens", fix="pad left or right"
            )
        found.append(tokens[places])
    return found


def _ids(given: Any, rank: int, name: str) -> np.ndarray:
    try:
        found = np.asarray(given)
    # Words of numpy's for rows of unequal lengths, of torch's for tensors that it has no form for.
    except (ValueError, TypeError, RuntimeError) as e:
        raise InputError(
            WHERE, f"{name} are no array ({e})", wanted="integers [batch, sequence], or rows of them"
        ) from e
    if found.size == 0:
        return np.zeros((0,) if rank == 1 else found.shape if found.ndim == 2 else (1, 0), np.int64)
    if found.dtype.kind not in "iu" or found.ndim > rank or found.ndim == 0:
        raise InputError(
            WHERE,
            f"{name} are no token ids",
            got=f"{found.dtype} {list(found.shape)}",
            wanted="integers [batch, sequence], or texts",
        )
    return np.atleast_2d(found).astype(np.int64) if rank == 2 else found.astype(np.int64)
