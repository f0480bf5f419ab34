"""Which fused attention an NPU has for an attention, and with which arguments; or the limit that it breaks.

`legality.toml` holds the limits, a row a family of chips and op, each with the documents that it was read from. `choose`
answers for one attention:

    PromptFlashAttention, FusedInferAttentionScore   with layout, sparse_mode, pre_tokens, next_tokens, form of the mask
    Refused                                          the limit, what was got, and the nearest legal choice

The mask's True means drop. Its forms: "none"; "compressed", a bool [2048, 2048] that is True above the diagonal, of which
sparse_mode 2 (top left causal), 3 (bottom right causal) and 4 (band) make the pairs that they hide; "full", a bool
[B, 1, Sq, Sk] with sparse_mode 0. In sparse_mode 0 pre_tokens and next_tokens name the band outside which the op skips
work; they are set where queries and keys are equally many, since only there every document agrees on where it starts.
With one query the op ignores sparse modes: a mask that would depend on one is full wherever that may happen.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from tilecut_runtime.errors import LoweringError

# What "no limit" is called in pre_tokens and next_tokens; left out, ATC takes 0.
ALL_TOKENS = 2147483647
TABLE = "legality.toml"


@dataclass(frozen=True)
class AttentionShape:
    """What the table is asked about: sizes and options of one attention.

    Attributes:
        dtype: of q, k and v in the op.
        width, value_width: of a head of q and k, and of v.
        queries, keys: how many; None where that is known at run time only.
        equal_lengths: whether there are as many queries as keys, at every size.
        padding: keys are padded. lengths: and those that are left are the first of their row, as many as a tensor says.
        hidden: a bool mask of the model's hides pairs.
        bias, slopes, softcap, dropout: a float is added to the scores, ALiBi, a soft-cap, dropped weights.
        packed: sequences one after another without padding, layout TND.
    """

    dtype: str
    width: int
    value_width: int
    heads: int
    kv_heads: int
    queries: int | None = None
    keys: int | None = None
    equal_lengths: bool = True
    causal: str = "none"
    window: tuple[int, int] = (-1, -1)
    global_tokens: int = 0
    padding: bool = False
    lengths: bool = False
    hidden: bool = False
    bias: bool = False
    slopes: bool = False
    softcap: bool = False
    dropout: bool = False
    packed: bool = False
    layout: str = "BNSD"

    @property
    def decodes(self) -> bool:
        """Whether it is a decode step: one query against a cache."""
        return self.queries == 1 and self.keys != 1


@dataclass(frozen=True)
class Fused:
    """The op and its arguments.

    `kv_heads` is num_key_value_heads; `expand` says that KV heads are repeated first, `lengths` that
    actual_seq_lengths_kv tells the op of padding, and no mask.
    """

    op: str
    layout: str
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    mask: str
    kv_heads: int
    expand: bool
    inner_precise: int
    lengths: bool = False


@dataclass(frozen=True)
class Refused:
    """Why no fused op takes an attention, and the nearest one that it would take."""

    limit: str
    got: str
    nearest: str

    def __str__(self) -> str:
        return f"{self.limit}; got {self.got}; {self.nearest}"

    def error(self, where: str) -> LoweringError:
        """The refusal as an error, for those that cannot write the attention out."""
        return LoweringError(where, "no fused attention", got=self.got, wanted=self.limit, fix=self.nearest)


@functools.cache
def read_table() -> dict[str, Any]:
    """The table: documents, family and op."""
    return tomllib.loads(resources.files("tilecut_targets.ascend").joinpath(TABLE).read_text(encoding="utf-8"))


def family_row(family: str) -> dict[str, Any]:
    """What holds for a family of chips."""
    return read_table()["family"][family]


def op_row(op: str, family: str) -> dict[str, Any]:
    """The limits of an op on a family of chips."""
    rows = read_table()["op"][op]
    return rows.get(family) or rows["any"]


def fuses(family: str, container: str) -> bool:
    """Whether a container has a fused attention on these chips."""
    return any(family_row(family)[container].values())


def template_width(family: str, width: int) -> int:
    """The width that a head costs: of the op's next tiling template, or the next multiple of 16."""
    ops = [op for held in (family_row(family)["air"], family_row(family)["onnx"]) for op in held.values() if op]
    templates = op_row(ops[0], family)["templates"] if ops else []
    return next((t for t in templates if t >= width), -(-width // 16) * 16)


def choose(family: str, wanted: AttentionShape, container: str = "onnx") -> Fused | Refused:
    """The fused op for an attention on a family of chips, in an "onnx" or an "air" file, or why there is none."""
    held = family_row(family)
    op = held[container]["decode" if wanted.decodes else "prefill"]
    if not op:
        return _absent(family, wanted, container)
    row = op_row(op, family)
    refused = _beyond(op, row, wanted)
    if refused is not None:
        return refused
    expand = wanted.heads // wanted.kv_heads > row["ratio"]
    kv_heads = 0 if row.get("zero_kv_heads") else wanted.kv_heads
    lengths = _by_lengths(row, wanted)
    mask, mode, before, after = _masking(row, replace(wanted, padding=False) if lengths else wanted)
    if lengths and mode == 3:
        # Mode 3 counts from each row's own last key, mode 2 from the first: with as many queries as keys that hides the same.
        mode = 2
    if mask != "none" and (refused := _unmaskable(op, row, wanted)) is not None:
        return refused
    precise = row["inner_precise_masked"] if mask == "full" else row["inner_precise"]
    return Fused(op, "TND" if wanted.packed else wanted.layout, mode, before, after, mask, kv_heads, expand, precise, lengths)


def _absent(family: str, wanted: AttentionShape, container: str) -> Refused:
    held = family_row(family)
    step = "decode step" if wanted.decodes else "prefill"
    other = "air" if container == "onnx" else "onnx"
    nearest = "MatMul and Softmax are what it has"
    if op := held[other]["decode" if wanted.decodes else "prefill"]:
        nearest = f"the .{other} file has {op}"
    return Refused(f"{held['products']} have no fused attention in an .{container} file", f"a {step}", nearest)


def _beyond(op: str, row: dict[str, Any], wanted: AttentionShape) -> Refused | None:
    """The first limit that sizes and options break."""
    if wanted.dropout:
        return Refused(f"{op} drops no weights", "dropout", "call model.eval() first")
    for name, what in (("bias", "an additive bias"), ("slopes", "ALiBi"), ("softcap", "a soft-cap")):
        if getattr(wanted, name):
            return Refused(f"{op} adds nothing to its scores", what, "MatMul and Softmax do")
    if wanted.dtype not in row["dtypes"]:
        return Refused(f"{op} takes {' or '.join(row['dtypes'])}", wanted.dtype, f"the nearest is {row['dtypes'][0]}")
    if row["same_value_width"] and wanted.width != wanted.value_width:
        got = f"queries are {wanted.width} wide and values {wanted.value_width}"
        wide = _multiple(max(wanted.width, wanted.value_width), row["head_multiple"])
        return Refused(f"{op} takes heads of one width", got, f"the nearest is {wide} for both")
    return _beyond_sizes(op, row, wanted)


def _beyond_sizes(op: str, row: dict[str, Any], wanted: AttentionShape) -> Refused | None:
    width, step, most = wanted.width, row["head_multiple"], row["head_width"]
    if width % step or width > most:
        near = min(_multiple(width, step), most)
        return Refused(
            f"{op} takes head widths in multiples of {step} up to {most}", str(width), f"the nearest is {near}"
        )
    if wanted.heads > row["heads"]:
        return Refused(f"{op} takes up to {row['heads']} heads", str(wanted.heads), f"the nearest is {row['heads']}")
    ratio = wanted.heads // wanted.kv_heads
    # Where the op takes no groups at all, KV heads are repeated; a ratio beyond its limit is a model to change.
    if 1 < row["ratio"] < ratio:
        least = -(-wanted.heads // row["ratio"])
        near = next(n for n in range(least, wanted.heads + 1) if wanted.heads % n == 0)
        got = f"{wanted.heads} heads on {wanted.kv_heads}, {ratio}"
        return Refused(f"{op} takes up to {row['ratio']} heads for one KV head", got, f"the nearest is {near} KV heads")
    if "sequence" in row and (longest := max(wanted.queries or 0, wanted.keys or 0)) > row["sequence"]:
        near = f"the nearest is {row['sequence']}"
        return Refused(f"{op} takes up to {row['sequence']} positions", str(longest), near)
    layout = "TND" if wanted.packed else wanted.layout
    if layout not in row["layouts"]:
        return Refused(f"{op} takes the layouts {', '.join(row['layouts'])}", layout, "the nearest is BNSD with a mask")
    if layout in ("BSH", "BSND") and wanted.heads * width > row["flat_width"]:
        limit = f"{op} takes heads times width up to {row['flat_width']} in {layout}"
        return Refused(limit, str(wanted.heads * width), "the nearest is layout BNSD")
    if wanted.packed and width not in row["packed_widths"]:
        widths = row["packed_widths"]
        near = min(widths, key=lambda w: (abs(w - width), w))
        limit = f"{op} takes TND with head widths {' and '.join(map(str, widths))}"
        return Refused(limit, str(width), f"the nearest is {near}, or BNSD with a mask")
    return None


def _multiple(n: int, step: int) -> int:
    return -(-n // step) * step


def _by_lengths(row: dict[str, Any], wanted: AttentionShape) -> bool:
    """Whether padding can be told by lengths: nothing else is hidden but what lies above the diagonal of a square."""
    plain = not (wanted.hidden or wanted.global_tokens) and wanted.window == (-1, -1)
    return row["actual_lengths"] and wanted.lengths and plain and (wanted.causal == "none" or wanted.equal_lengths)


def _masking(row: dict[str, Any], wanted: AttentionShape) -> tuple[str, int, int, int]:
    """The mask's form, sparse_mode, pre_tokens and next_tokens."""
    left, right = wanted.window
    if wanted.causal != "none":
        right = 0
    before, after = (n if n >= 0 else ALL_TOKENS for n in (left, right))
    windowed = left >= 0 or (right >= 0 and wanted.causal == "none")
    free = not (wanted.padding or wanted.hidden or wanted.global_tokens)
    top_left = wanted.causal == "top_left" and not wanted.equal_lengths
    if free and not windowed:
        if wanted.causal == "none" or (wanted.queries == 1 and not top_left):
            return "none", 0, ALL_TOKENS, ALL_TOKENS
        mode = 2 if top_left else 3
        # With one query the op takes no sparse mode; bottom right causal hides nothing then, top left does.
        if mode in row["sparse_modes"] and (mode == 3 or (wanted.queries or 0) > 1):
            return "compressed", mode, ALL_TOKENS, 0
    if free and windowed and wanted.equal_lengths and 4 in row["sparse_modes"]:
        return "compressed", 4, before, after
    banded = wanted.equal_lengths and not wanted.global_tokens
    if not banded:
        before = after = ALL_TOKENS
    elif not row["any_pre_tokens"]:
        before, after = ALL_TOKENS, 0 if after == 0 else ALL_TOKENS
    return "full", 0, before, after


def _unmaskable(op: str, row: dict[str, Any], wanted: AttentionShape) -> Refused | None:
    """Why the op takes no mask at these lengths."""
    step = row["masked_sequence_multiple"]
    if row["mask_needs_equal_lengths"] and not wanted.equal_lengths:
        return Refused(f"{op} takes a mask between equally many queries and keys", "different numbers", "none is near")
    if step == 1:
        return None
    limit = f"{op} takes a mask at fixed lengths that are multiples of {step}"
    if wanted.queries is None or wanted.keys is None:
        return Refused(limit, "a length that is known at run time", "compile with dynamic_shapes={} at such a length")
    if wanted.queries % step or wanted.keys % step:
        near = _multiple(max(wanted.queries, wanted.keys), step)
        return Refused(limit, f"{wanted.queries} and {wanted.keys}", f"the nearest is {near}")
    return None
