"""Calibration batches as the passes see them: tensors by input name, labels apart, padded positions known.

A batch is a dict of tensors named like the graph's inputs; `labels` (or `label`), when there, are taken out of it and
aligned with the output (`align_labels.py`). Positions that `attention_mask` (see `Batch.mask`) marks as padding neither
count in a loss nor in a least-squares fit. Integers are cast to the input's own type; other names are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilecut_passes.align_labels import IGNORED, align_labels, check_labels, scored_output
from tilecut_passes.flat_forward import nested_input
from tilecut_passes.graph import Graph, size_at
from tilecut_runtime.errors import CalibrationError


@dataclass(frozen=True)
class Batch:
    """One batch: `inputs` by name, `labels` or None; `hiding` names the masks in which what is not 0 is padding."""

    inputs: dict[str, Tensor]
    labels: Tensor | None = None
    hiding: tuple[str, ...] = ()

    @property
    def mask(self) -> Tensor | None:
        """What is real, 0 at padding: of `attention_mask`, else of the only input of rank 2 that is a mask by its name, or
        that hides."""
        named = {
            k: v == 0 if k in self.hiding else v
            for k, v in self.inputs.items()
            if v.ndim == 2
            and not v.is_floating_point()
            and ("mask" in k or k in self.hiding)
            # Not of positions on positions [S, S].
            and any(t.ndim and t.shape[0] == v.shape[0] for other, t in self.inputs.items() if other != k)
        }
        return named.get("attention_mask", next(iter(named.values())) if len(named) == 1 else None)

    @property
    def positions(self) -> int:
        """Real positions: of the mask, else of the first integer input [B, S], else rows."""
        if self.mask is not None:
            return int((self.mask != 0).sum())
        ids = [t for t in self.inputs.values() if t.ndim == 2 and not t.is_floating_point()]
        return ids[0].numel() if ids else next(iter(self.inputs.values())).shape[0]

    def valid(self, like: Tensor) -> Tensor | None:
        """Bool over the leading dimensions of `like` that are [batch, sequence]: True for real positions; or None."""
        mask = self.mask
        if mask is None:
            return None
        if like.ndim >= 2 and tuple(like.shape[:2]) == tuple(mask.shape):
            return mask != 0
        if like.ndim >= 1 and like.shape[0] == mask.numel():
            return (mask != 0).flatten()
        return None

    def rows(self, value: Tensor) -> Tensor:
        """The real positions of an activation as rows [N, last dimension]; [N, 1] of one number each (a span's start)."""
        valid = self.valid(value)
        if valid is not None and value.ndim == valid.ndim:
            return value[valid][:, None]
        real = value[valid] if valid is not None else value
        return real.reshape(-1, value.shape[-1] if value.ndim > 1 else 1)


def _tensor(value: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    # torch raises one or the other for objects, ragged lists, dtypes that it lacks and numbers too large.
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise CalibrationError(
            where, f"no tensor can be made of it ({str(e).partition(chr(10))[0]})", got=type(value).__name__
        ) from e


def _flat(raw: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """A batch with key-value caches and other structures as the flat inputs of the graph."""
    out: dict[str, Any] = {}
    for key, value in raw.items():
        nested = None if str(key) in names or isinstance(value, Tensor) else nested_input(str(key), value)
        out |= nested.tensors if nested is not None else {str(key): value}
    return out


def check_batches(graph: Graph, batches: Iterable[Mapping[str, Any]]) -> list[Batch]:
    """Turn the caller's batches into `Batch`es that fit the graph's inputs.

    Raises:
        CalibrationError: no batch, a batch that is no mapping, lacks an input, has one of another dtype or shape, ids
            that the model has no embedding for, padding only, or labels that the output cannot be compared with.
    """
    specs, tables = graph.input_specs(), graph.table_rows()
    out = []
    try:
        given = iter(batches)
    except TypeError as e:
        raise CalibrationError(
            "calibration",
            "not an iterable of batches",
            got=type(batches).__name__,
            wanted="dicts of tensors by input name",
        ) from e
    for i, raw in enumerate(given):
        where = f"calibration batch {i}"
        if not isinstance(raw, Mapping):
            raise CalibrationError(
                where,
                "not a dict of tensors",
                got=type(raw).__name__,
                wanted="{" + ", ".join(s.name for s in specs) + "}",
            )
        held = {k: _tensor(v, f"{where}: {k}") for k, v in _flat(raw, {s.name for s in specs}).items()}
        labels = held.pop("labels", held.pop("label", None))
        sizes: dict[str, int] = {}
        inputs = {}
        for spec in specs:
            if spec.name not in held:
                raise CalibrationError(
                    where,
                    f"input {spec.name} is missing",
                    got=", ".join(held) or "nothing",
                    wanted=", ".join(s.name for s in specs),
                )
            tensor = held[spec.name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            integral = not tensor.is_floating_point() and not getattr(torch, spec.dtype).is_floating_point
            if dtype != spec.dtype and not integral:
                raise CalibrationError(where, f"input {spec.name} has another dtype", got=dtype, wanted=spec.dtype)
            if tensor.ndim != len(spec.shape):
                raise CalibrationError(
                    where, f"input {spec.name} has another rank", got=list(tensor.shape), wanted=str(spec)
                )
            for size, dim in zip(tensor.shape, spec.shape):
                wanted = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
                limits = graph.ranges.get(str(dim))
                if size != wanted or (limits and (size < limits.min or (limits.max is not None and size > limits.max))):
                    raise CalibrationError(
                        where,
                        f"input {spec.name} has another shape",
                        got=list(tensor.shape),
                        wanted=f"{spec} with {sizes or 'those sizes'}",
                    )
            inputs[spec.name] = tensor.to(getattr(torch, spec.dtype))
        for name, rows in tables.items():
            ids = inputs[name]
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
                raise CalibrationError(
                    where,
                    f"input {name} holds an id that the model has no embedding for",
                    got=f"{int(ids.min())}..{int(ids.max())}",
                    wanted=f"0..{rows - 1}",
                    fix="use the model's own tokenizer",
                )
        if any(t.is_floating_point() and not t.isfinite().all() for t in inputs.values()):
            raise CalibrationError(where, "an input holds NaN or infinity")
        batch = Batch(inputs, _labels(graph, labels, inputs, sizes, where), graph.hiding)
        if batch.mask is not None and not batch.mask.any():
            raise CalibrationError(where, "every position is padding")
        out.append(batch)
    if not out:
        raise CalibrationError("calibration", "no batches", got=0, wanted="at least 1")
    return out


def _labels(
    graph: Graph, labels: Tensor | None, inputs: Mapping[str, Tensor], sizes: Mapping[str, int], where: str
) -> Tensor | None:
    """Labels beside the outputs that they belong to; None where there are none, or none that counts."""
    if labels is None:
        return None
    rows = next(iter(inputs.values())).shape[0]
    if labels.ndim == 0 or labels.shape[0] != rows:
        raise CalibrationError(where, "labels do not match the batch", got=list(labels.shape), wanted=f"[{rows}, ..]")
    name = scored_output(graph.outputs)
    spec = next(s for s in graph.output_specs() if s.name == name)
    labels = align_labels(labels, inputs)
    check_labels(labels, name, [size_at(dim, sizes) for dim in spec.shape], f"{where}: labels")
    return labels if labels.is_floating_point() or bool((labels != IGNORED).any()) else None
