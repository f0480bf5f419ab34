"""Calibration batches as the passes see them: tensors by input name, labels apart, padded positions known.

A batch is a dict of tensors named like the graph's inputs; `labels`, when there, are taken out of it. Positions that
`attention_mask` (see `Batch.mask`) marks 0 are padding: they neither count in a loss nor in a least-squares fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilecut_passes.flat_forward import nested_input
from tilecut_passes.graph import Graph
from tilecut_runtime.errors import CalibrationError


@dataclass(frozen=True)
class Batch:
    """One batch: `inputs` by name, `labels` or None."""

    inputs: dict[str, Tensor]
    labels: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """The input that marks padding with 0: `attention_mask`, else the only one of rank 2 with "mask" in its name."""
        named = {k: v for k, v in self.inputs.items() if "mask" in k and v.ndim == 2 and not v.is_floating_point()}
        return named.get("attention_mask", next(iter(named.values())) if len(named) == 1 else None)

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
        """The real positions of an activation as rows [N, last dimension]."""
        valid = self.valid(value)
        return value[valid].reshape(-1, value.shape[-1]) if valid is not None else value.reshape(-1, value.shape[-1])


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
        CalibrationError: no batch, a batch that is no mapping, lacks an input, or has one of another dtype or shape.
    """
    specs = graph.input_specs()
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
        labels = held.pop("labels", None)
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
        if labels is not None and (labels.ndim == 0 or labels.shape[0] != next(iter(inputs.values())).shape[0]):
            raise CalibrationError(
                where,
                "labels do not match the batch",
                got=list(labels.shape),
                wanted=f"[{next(iter(inputs.values())).shape[0]}, ..]",
            )
        if any(t.is_floating_point() and not t.isfinite().all() for t in inputs.values()):
            raise CalibrationError(where, "an input holds NaN or infinity")
        out.append(Batch(inputs, labels))
    if not out:
        raise CalibrationError("calibration", "no batches", got=0, wanted="at least 1")
    return out
