"""Run many rows of different lengths: sort by length, bucket, pad each bucket to its longest, cut the padding off again.

Before: a list of rows, each a dict by input name of [1, S, ..] or [S, ..]
After: a list of outputs in the same order, each as if its row had run alone

A batch costs the tokens that it holds, padding included, and something for being a run at all. `buckets` finds the
division of the sorted rows that costs least, so a row is padded only where that costs less than another run. Where an
output has no dimension of rows, rows run alone; where a size is computed from others, only rows of one length share a run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tilecut_runtime.errors import InputError
from tilecut_runtime.manifest import TensorSpec
from tilecut_runtime.session import check_inputs

if TYPE_CHECKING:
    from tilecut_runtime.session import Session

WHERE = "Session.run_many"
# What a run costs beside its tokens, in tokens: its calls, and reading weights that few rows make no use of.
RUN_COST = 16
MAX_TOKENS = 4096
# The name of a mask whose zeros hide positions, as transformers and its tokenizers have it.
MASK = "attention_mask"


@dataclass(frozen=True)
class Row:
    """One row's arrays, each [1, ..]; its dynamic sizes by name; whether the caller gave it without the first dimension."""

    arrays: dict[str, np.ndarray]
    sizes: dict[str, int]
    bare: bool


def run_many(
    session: Session,
    inputs: Iterable[Mapping[str, Any]],
    max_tokens: int = MAX_TOKENS,
    padding: Mapping[str, float] | None = None,
) -> list[dict[str, np.ndarray]]:
    """The outputs of every row; see `Session.run_many`."""
    if isinstance(inputs, Mapping | str | bytes) or not isinstance(inputs, Iterable):
        raise InputError(
            WHERE, "inputs must be a list of rows", got=type(inputs).__name__, wanted="[{name: array}, ..]"
        )
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise InputError(WHERE, "max_tokens must be a positive integer", got=repr(max_tokens))
    names = [spec.name for spec in session.inputs]
    if unknown := [str(name) for name in padding or {} if name not in names]:
        raise InputError(WHERE, "padding names an unknown input", got=", ".join(unknown), wanted=", ".join(names))
    batch = _batch_name(session)
    rows = [_row(session, batch, i, row) for i, row in enumerate(inputs)]
    if not rows:
        return []
    padded = sorted({name for spec in session.inputs for name in _names(spec)} - {batch})
    differing = [name for name in padded if len({row.sizes[name] for row in rows}) > 1]
    fills = _fills(session, padding or {}, differing, rows)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[tuple(row.sizes[n] for n in differing) if _computes_sizes(session) else ()].append(i)
    results: list[dict[str, np.ndarray]] = [{} for _ in rows]
    most = _most_rows(session, batch)
    for members in groups.values():
        lengths = np.array([[rows[i].sizes[n] for n in padded] for i in members], np.int64)
        for chosen in buckets(lengths, max_tokens, most):
            taken = [members[i] for i in chosen]
            together = session.run(_stack([rows[i] for i in taken], session.inputs, batch, fills))
            for place, i in enumerate(taken):
                results[i] = _cut(together, place, rows[i], session.outputs, batch)
    return results


def buckets(
    lengths: np.ndarray, max_tokens: int, max_rows: int | None = None, run_cost: int = RUN_COST
) -> list[list[int]]:
    """Divide rows into batches so that the sum of `run_cost + rows * longest` is least.

    Args:
        lengths: [N, sizes] of every row; a row costs the sum of its sizes.
        max_tokens: no batch of several rows holds more, padding included.
        max_rows: no batch has more rows.

    Returns:
        Indices of the rows of every batch; rows that are not sorted by length keep the order that they had.
    """
    order = np.argsort(lengths.sum(1), kind="stable")
    ordered = lengths[order]
    count = len(ordered)
    best, start = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):
        # No batch that ends with this row has more rows, since this one is the longest.
        limit = max(1, min(max_tokens // max(int(ordered[end - 1].sum()), 1), max_rows or end, end))
        window = ordered[end - limit : end][::-1]
        tokens = np.maximum.accumulate(window, axis=0).sum(1) * np.arange(1, limit + 1)
        cost = best[end - limit : end][::-1] + tokens + run_cost
        # Sizes that grow apart (a long text, a long answer) may make the padded batch larger than its longest row says.
        cost[1:][tokens[1:] > max_tokens] = np.inf
        rows = int(cost.argmin()) + 1
        best[end], start[end] = cost[rows - 1], end - rows
    found: list[list[int]] = []
    end = count
    while end:
        found.append(order[start[end] : end].tolist())
        end = int(start[end])
    return found[::-1]


def _names(spec: TensorSpec) -> list[str]:
    """The dynamic sizes of a tensor that are names, not expressions."""
    return [s for s in spec.shape if isinstance(s, str) and s.isidentifier()]


def _batch_name(session: Session) -> str | None:
    """The name of the first dimension of every input; None where it is fixed at one."""
    first = {spec.shape[0] if spec.shape else None for spec in session.inputs}
    if first == {1}:
        return None
    name = next(iter(first)) if len(first) == 1 else None
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(
            WHERE,
            "the model's inputs have no dimension of rows in common",
            got="; ".join(map(str, session.inputs)),
            wanted="one dynamic size as the first of every input",
            fix="call run with whole batches",
        )
    return name


def _row(session: Session, batch: str | None, index: int, given: Mapping[str, Any]) -> Row:
    """One row, checked as a batch of one."""
    where = f"{WHERE}: inputs[{index}]"
    ranks = {spec.name: len(spec.shape) for spec in session.inputs}
    bare = isinstance(given, Mapping) and all(
        getattr(value, "ndim", None) == ranks[name] - 1 for name, value in given.items() if name in ranks
    )
    if bare:
        given = {name: value[None] if name in ranks else value for name, value in given.items()}
    try:
        arrays = check_inputs(given, session.manifest)
    except InputError as e:
        place = e.where.removeprefix("Session.run")
        raise InputError(where + place, e.problem, got=e.got, wanted=e.wanted, fix=e.fix) from e
    sizes = {
        size: array.shape[axis]
        for spec, array in zip(session.inputs, arrays.values(), strict=True)
        for axis, size in enumerate(spec.shape)
        if isinstance(size, str) and size.isidentifier()
    }
    if batch is not None and sizes[batch] != 1:
        raise InputError(where, "holds several rows", got=sizes[batch], wanted="one", fix="give every row on its own")
    return Row(arrays, sizes, bare)


def _fills(
    session: Session, padding: Mapping[str, float], differing: Sequence[str], rows: Sequence[Row]
) -> dict[str, float]:
    """What every input is padded with.

    Raises:
        InputError: a size differs between rows and no mask covers it.
    """
    if _computes_sizes(session):
        return {}
    covered = {
        name for spec in session.inputs if spec.name in padding or _is_mask(spec) for name in _names(spec)
    }  # fmt: skip
    if open_sizes := [name for name in differing if name not in covered]:
        name = open_sizes[0]
        found = [row.sizes[name] for row in rows]
        raise InputError(
            WHERE,
            f"rows differ in {name}, and the model has no {MASK} over it that would hide padding",
            got=f"{min(found)} to {max(found)}",
            wanted="one length",
            fix="compile the model with an attention mask among its inputs, or say what hides padding: "
            "padding={input: value}",
        )
    ids = _pad_id(session)
    return {spec.name: padding.get(spec.name, ids if spec.name.endswith("input_ids") else 0) for spec in session.inputs}


def _is_mask(spec: TensorSpec) -> bool:
    return spec.name.endswith(MASK) and len(spec.shape) == 2 and (spec.dtype == "bool" or "int" in spec.dtype)


def _pad_id(session: Session) -> int:
    """The padding token of the model's config: models of transformers look for it to find a text's last token."""
    if "config.json" not in session.manifest.files:
        return 0
    session.manifest.check_files(session.path, ["config.json"])
    held = json.loads((session.path / "config.json").read_text(encoding="utf-8"))
    found = held.get("pad_token_id")
    return found if isinstance(found, int) and found >= 0 else 0


def _computes_sizes(session: Session) -> bool:
    """Whether a size is an expression of others: how long a padded row's part of it is cannot be said."""
    sizes = [size for spec in (*session.inputs, *session.outputs) for size in spec.shape[1:]]
    return any(isinstance(size, str) and not size.isidentifier() for size in sizes)


def _most_rows(session: Session, batch: str | None) -> int | None:
    """The rows that a run may have."""
    if batch is None or any(not spec.shape or spec.shape[0] != batch for spec in session.outputs):
        return 1
    return session.manifest.dims[batch].max


def _stack(
    rows: Sequence[Row], specs: Sequence[TensorSpec], batch: str | None, fills: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """The rows as one batch, each input filled up to its longest."""
    if len(rows) == 1:
        return rows[0].arrays
    out = {}
    for spec in specs:
        parts = [row.arrays[spec.name] for row in rows]
        shape = [len(rows), *(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts)))]
        whole = np.full(shape, fills.get(spec.name, 0), parts[0].dtype)
        for i, part in enumerate(parts):
            whole[(i, *(slice(size) for size in part.shape[1:]))] = part[0]
        out[spec.name] = whole
    return out


def _cut(
    together: Mapping[str, np.ndarray], place: int, row: Row, specs: Sequence[TensorSpec], batch: str | None
) -> dict[str, np.ndarray]:
    """One row of a batch's outputs, without padding. The copy lets the batch go."""
    out = {}
    for spec in specs:
        value = together[spec.name]
        if spec.shape and spec.shape[0] == (1 if batch is None else batch):
            sizes = (slice(row.sizes.get(size)) if isinstance(size, str) else slice(None) for size in spec.shape[1:])
            value = value[(slice(place, place + 1), *sizes)]
            value = (value[0] if row.bare else value).copy()
        out[spec.name] = value
    return out
