"""Which op an NPU has for an RMS norm or a rotary embedding; or the limit that it breaks. The table is `legality.toml`.

    choose_norm     "RmsNorm"
    choose_rotary   RotaryPositionEmbedding or RotaryMul, with its mode; the latter shares an element of its tables with so
                    many of x only, so `expand` may ask for a table of every row's own

In ONNX the epsilon is the plugin's, whatever the node says: other norms are refused there. Sizes that are known at run time
only are None: a batch within 999 is what the report's reader has to see to, but where batch times heads has a limit, an
unknown batch breaks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tilecut_targets.ascend.legality import Refused, family_row, op_row

LAYOUT = "BSND"
HALF, INTERLEAVE = "half", "interleave"


@dataclass(frozen=True)
class RotaryShape:
    """What the table is asked about a rotary embedding: `shared` tables are those of all rows."""

    dtype: str
    width: int
    heads: int
    batch: int | None
    interleaved: bool
    shared: bool


@dataclass(frozen=True)
class FusedRotary:
    """The op, its mode, and whether tables are repeated for every row first."""

    op: str
    mode: str
    expand: bool


def choose_norm(family: str, container: str, dtype: str, width: int, eps: float) -> str | Refused:
    """The op for a norm over `width` elements on a family of chips, in an "onnx" or an "air" file, or why there is none."""
    op = family_row(family)["norm"][container]
    if not op:
        return _absent(family, "norm", container)
    row = op_row(op, family)
    if dtype not in row["dtypes"]:
        return _wrong_type(op, row, dtype)
    if container == "onnx" and np.float32(eps) != np.float32(row["onnx_epsilon"]):
        limit = f"ATC's reader of the node sets epsilon {row['onnx_epsilon']:g}, whatever the node says"
        nearest = "written out it is exact"
        return Refused(limit, f"{eps:g}", nearest + _other(family, "norm", container, "takes any"))
    size = width * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    if size < row["least_bytes"]:
        return Refused(f"{op} takes at least {row['least_bytes']} bytes", f"{size}", "written out it is exact")
    return op


def choose_rotary(family: str, container: str, wanted: RotaryShape) -> FusedRotary | Refused:
    """The op for an embedding of x [B, S, N, D] on a family of chips, or why there is none."""
    op = family_row(family)["rotary"][container]
    if not op:
        return _absent(family, "rotary", container)
    row = op_row(op, family)
    if wanted.dtype not in row["dtypes"]:
        return _wrong_type(op, row, wanted.dtype)
    mode = INTERLEAVE if wanted.interleaved else HALF
    if mode not in row["modes"]:
        return Refused(f"{op} takes the modes {', '.join(row['modes'])}", mode, "written out it is exact")
    step, most = row["width_multiple"], row["width"]
    if wanted.width % step or wanted.width > most:
        near = min(-(-wanted.width // step) * step, most)
        return Refused(f"{op} takes widths in multiples of {step} up to {most}", str(wanted.width), f"the nearest is {near}")
    for name, size in (("rows", wanted.batch), ("heads", wanted.heads)):
        if size is not None and size > row.get(name, size):
            return Refused(f"{op} takes up to {row[name]} {name}", str(size), f"the nearest is {row[name]}")
    if wanted.interleaved and "interleaved_rows" in row:
        limit = f"{op} takes interleaved pairs up to {row['interleaved_rows']} batch times heads, one table for all rows"
        if wanted.batch is None or wanted.batch * wanted.heads > row["interleaved_rows"] or not wanted.shared:
            batch = "a batch that is known at run time" if wanted.batch is None else f"{wanted.batch} times {wanted.heads}"
            return Refused(limit, batch if wanted.shared else "a table for every row", "compile at a fixed batch")
    expand = wanted.shared and "shared" in row
    return FusedRotary(op, mode, expand and (wanted.batch is None or wanted.batch * wanted.heads > row["shared"]))


def _absent(family: str, kind: str, container: str) -> Refused:
    what = {"norm": "RMS norm", "rotary": "rotary embedding"}[kind]
    limit = f"{family_row(family)['products']} have no fused {what} in an .{container} file"
    return Refused(limit, f"one {what}", "it is written out" + _other(family, kind, container, "has it"))


def _other(family: str, kind: str, container: str, what: str) -> str:
    """What the other container has."""
    other = "air" if container == "onnx" else "onnx"
    op = family_row(family)[kind][other]
    return f", and {op} of the .{other} file {what}" if op else ""


def _wrong_type(op: str, row: dict[str, Any], dtype: str) -> Refused:
    return Refused(f"{op} takes {' or '.join(row['dtypes'])}", dtype, f"the nearest is {row['dtypes'][-1]}")
