"""What the attention ops refuse, each as one InputError before any work; both ops' rules side by side. torch only.

Shapes, dtypes, devices and options are checked by looking at them. Reading the values of cu_seqlens and of a block list
makes the CPU wait for a GPU. In eager calls they are read once per tensor and version of its content; a compiled graph
may put other values into a tensor without a word, so there a GPU asserts them itself, and nobody waits.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from tilecut_runtime.errors import InputError
from tilecut_runtime.transpose_blocks import BLOCK

CAUSAL = ("none", "top_left", "bottom_right")
# Of the kernels; the naive twin takes any.
CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_WIDTH_MULTIPLE, HEAD_WIDTH_LIMIT = 8, 256

_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    **options: Any,
) -> None:
    """Refuse arguments that `tilecut::attention` cannot take."""
    where = "tilecut.attention"
    _check_heads(where, q, k, v, 4, "[B, H, S, D]")
    b, hq, sq, d = q.shape
    hk, sk = k.shape[1], k.shape[2]
    if k.shape[0] != b or k.shape[3] != d:
        raise InputError(where, "k does not fit q", got=list(k.shape), wanted=f"[{b}, Hk, Sk, {d}]")
    if tuple(v.shape[:3]) != tuple(k.shape[:3]):
        raise InputError(where, "v does not fit k", got=list(v.shape), wanted=f"[{b}, {hk}, {sk}, E]")
    if key_padding is not None and (key_padding.dtype != torch.bool or tuple(key_padding.shape) != (b, sk)):
        raise InputError(
            where,
            "key_padding does not fit",
            got=f"{key_padding.dtype} {list(key_padding.shape)}",
            wanted=f"torch.bool [{b}, {sk}]",
        )
    if bias is not None:
        if bias.ndim != 4 or any(s not in (1, w) for s, w in zip(bias.shape, (b, hq, sq, sk))):
            raise InputError(
                where,
                "bias does not broadcast to the scores",
                got=list(bias.shape),
                wanted=f"[{b}|1, {hq}|1, {sq}|1, {sk}|1]",
            )
        if not bias.is_floating_point():
            fix = "a boolean mask as a bias is torch.where(mask, 0.0, -inf)"
            raise InputError(where, "bias must be floating point", got=bias.dtype, fix=fix)
        if q.device.type == "cuda" and bias.dtype not in CUDA_DTYPES:
            raise InputError(
                where, "the kernels have no such dtype of bias", got=bias.dtype, wanted="float16, bfloat16, float32"
            )
    _check_slopes(where, q, alibi_slopes)
    _check_devices(where, q, key_padding=key_padding, bias=bias)
    _check_options(where, q, **options)


def check_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_offsets: Tensor | None,
    block_indices: Tensor | None,
    alibi_slopes: Tensor | None,
    **options: Any,
) -> None:
    """Refuse arguments that `tilecut::attention_varlen` cannot take, as far as their values do not matter."""
    where = "tilecut.attention_varlen"
    _check_heads(where, q, k, v, 3, "[T, H, D]")
    if k.shape[2] != q.shape[2]:
        raise InputError(where, "k does not fit q", got=list(k.shape), wanted=f"[Tk, Hk, {q.shape[2]}]")
    if tuple(v.shape[:2]) != tuple(k.shape[:2]):
        raise InputError(where, "v does not fit k", got=list(v.shape), wanted=f"[{k.shape[0]}, {k.shape[1]}, E]")
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds.dtype != torch.int32 or bounds.ndim != 1:
            raise InputError(
                where, f"{name} does not fit", got=f"{bounds.dtype} {list(bounds.shape)}", wanted="torch.int32 [N + 1]"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise InputError(
            where,
            "cu_seqlens_q and cu_seqlens_k differ in length",
            got=f"{list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}",
            wanted="[N + 1] each, for N sequences",
        )
    if (block_offsets is None) != (block_indices is None):
        raise InputError(where, "block_offsets and block_indices come together", fix="pass both or neither")
    if block_offsets is not None and block_indices is not None:
        if (
            block_offsets.dtype != torch.int32
            or block_offsets.ndim != 2
            or block_offsets.shape[0] not in (1, q.shape[1])
        ):
            raise InputError(
                where,
                "block_offsets does not fit",
                got=f"{block_offsets.dtype} {list(block_offsets.shape)}",
                wanted=f"torch.int32 [{q.shape[1]}|1, query blocks + 1]",
            )
        if block_indices.dtype != torch.int32 or block_indices.ndim != 1:
            raise InputError(
                where,
                "block_indices does not fit",
                got=f"{block_indices.dtype} {list(block_indices.shape)}",
                wanted="torch.int32 [listed blocks]",
            )
    _check_slopes(where, q, alibi_slopes)
    _check_devices(
        where,
        q,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_offsets=block_offsets,
        block_indices=block_indices,
    )
    _check_options(where, q, **options)


def check_packed_values(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_offsets: Tensor | None,
    block_indices: Tensor | None,
    max_q: int,
    max_k: int,
) -> None:
    """Refuse sequences that do not divide the rows, lengths above max_q or max_k, and a malformed block list."""
    if q.is_cuda and (not _calls.eager or torch.cuda.is_current_stream_capturing()):
        _assert_on_device(cu_seqlens_q, q.shape[0], max_q)
        _assert_on_device(cu_seqlens_k, k.shape[0], max_k)
        return
    lengths = []
    for name, bounds, rows, longest, of in (
        ("q", cu_seqlens_q, q.shape[0], max_q, "queries"),
        ("k", cu_seqlens_k, k.shape[0], max_k, "keys"),
    ):
        lengths.append(_read_once((bounds,), rows, lambda b=bounds, n=name, r=rows: _lengths(b, n, r)))
        if max(lengths[-1], default=0) > longest:
            raise InputError(
                "tilecut.attention_varlen",
                f"max_{name} is below the longest sequence",
                got=longest,
                wanted=f"at least {max(lengths[-1])} {of}",
            )
    if block_offsets is not None and block_indices is not None:
        blocks = [[-(-n // BLOCK) for n in side] for side in lengths]
        _read_once((block_offsets, block_indices), blocks, lambda: _check_blocks(block_offsets, block_indices, *blocks))


UNFIT = "tilecut.attention_varlen: cu_seqlens do not divide the rows into sequences within max_q and max_k"


def _assert_on_device(bounds: Tensor, rows: int, longest: int) -> None:
    """Let the GPU stop, before the kernels, where bounds do not divide the rows. Block lists are taken as they are."""
    lengths = bounds.diff()
    fits = (bounds[0] == 0) & (bounds[-1] == rows) & (lengths >= 0).all() & (lengths <= longest).all()
    torch.ops.aten._assert_async.msg(fits, UNFIT)


class _Calls(threading.local):
    """Whether this thread is in an eager call of the user's: outside of one, a compiled graph calls the op."""

    eager = False


_calls = _Calls()


@contextlib.contextmanager
def eager_call() -> Iterator[None]:
    """What is in here may rely on tensors that are the same and unwritten to hold the same values."""
    before, _calls.eager = _calls.eager, True
    try:
        yield
    finally:
        _calls.eager = before


def _lengths(bounds: Tensor, name: str, rows: int) -> list[int]:
    """The lengths of the sequences, once their bounds are found to divide the rows."""
    where, values = f"tilecut.attention_varlen: cu_seqlens_{name}", bounds.tolist()
    if not values or values[0] != 0:
        raise InputError(where, "must start at 0", got=values[:1])
    lengths = [high - low for low, high in itertools.pairwise(values)]
    if min(lengths, default=0) < 0:
        at = next(i for i, n in enumerate(lengths) if n < 0)
        raise InputError(where, "must not decrease", got=f"{values[at]}, then {values[at + 1]} at index {at + 1}")
    if values[-1] != rows:
        raise InputError(where, "must end at the number of rows", got=values[-1], wanted=f"{rows}, the rows of {name}")
    return lengths


def _check_blocks(offsets: Tensor, indices: Tensor, q_blocks: list[int], k_blocks: list[int]) -> bool:
    where = "tilecut.attention_varlen"
    offsets, indices = offsets.cpu().long(), indices.cpu().long()
    if offsets.shape[1] != sum(q_blocks) + 1:
        raise InputError(
            where,
            "block_offsets does not fit the sequences",
            got=list(offsets.shape),
            wanted=f"{sum(q_blocks) + 1} columns: {sum(q_blocks)} query blocks of {BLOCK}, and the end",
        )
    counts, ends = offsets.diff(dim=1), [0, *offsets[:, -1].tolist()]
    if (counts < 0).any() or offsets[:, 0].tolist() != ends[:-1] or ends[-1] != len(indices):
        raise InputError(
            where,
            "block_offsets must rise through block_indices, each head from where the last one ended",
            got=offsets.tolist(),
            wanted=f"0 to {len(indices)}",
        )
    limits = torch.repeat_interleave(torch.tensor(k_blocks), torch.tensor(q_blocks))
    for first, row in zip(offsets[:, 0].tolist(), counts):
        listed = indices[first : first + int(row.sum())]
        owner = torch.repeat_interleave(torch.arange(len(row)), row)
        outside = (listed < 0) | (listed >= limits[owner])
        if outside.any():
            at = int(outside.nonzero()[0])
            raise InputError(
                where,
                f"a KV block of query block {int(owner[at])} is outside of its sequence",
                got=int(listed[at]),
                wanted=f"0 to {int(limits[owner[at]]) - 1}",
            )
        falls = (listed.diff() <= 0) & (owner.diff() == 0)
        if falls.any():
            at = int(falls.nonzero()[0])
            raise InputError(
                where,
                f"the KV blocks of query block {int(owner[at])} must rise, each listed once",
                got=f"{int(listed[at])}, then {int(listed[at + 1])}",
            )
    return True


def _read_once(tensors: tuple[Tensor, ...], beside: object, read: Callable[[], Any]) -> Any:
    """`read()` of the tensors and of what is beside them, in eager calls kept while the first lives and none is written to."""
    # Inference tensors do not count the writes to them.
    if not _calls.eager or any(x.is_inference() for x in tensors):
        return read()
    key = ([(WeakIdRef(x), x._version) for x in tensors], beside)
    held = _read.get(tensors[0])
    if held is None or held[0] != key:
        held = _read[tensors[0]] = (key, read())
    return held[1]


def _check_heads(where: str, q: Tensor, k: Tensor, v: Tensor, rank: int, shape: str) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != rank:
            raise InputError(where, f"{name} has the wrong rank", got=list(x.shape), wanted=shape)
        if x.dtype != q.dtype or x.device != q.device:
            raise InputError(
                where,
                f"{name} differs from q in dtype or device",
                got=f"{x.dtype} on {x.device}",
                wanted=f"{q.dtype} on {q.device}",
            )
    if not q.is_floating_point():
        raise InputError(where, "q, k, v must be floating point", got=q.dtype)
    hq, hk = q.shape[1], k.shape[1]
    if hk == 0 or hq % hk:
        raise InputError(
            where,
            "query heads are no multiple of KV heads",
            got=f"{hq} query heads, {hk} KV heads",
            fix="repeat or prune KV groups evenly",
        )
    if q.device.type == "cuda":
        if q.dtype not in CUDA_DTYPES:
            raise InputError(where, "the kernels have no such dtype", got=q.dtype, wanted="float16, bfloat16, float32")
        for name, x in (("q", q), ("v", v)):
            if x.shape[-1] % HEAD_WIDTH_MULTIPLE or not 0 < x.shape[-1] <= HEAD_WIDTH_LIMIT:
                raise InputError(
                    where,
                    f"the kernels cannot take the head width of {name}",
                    got=x.shape[-1],
                    wanted=f"a multiple of {HEAD_WIDTH_MULTIPLE} up to {HEAD_WIDTH_LIMIT}",
                    fix="pad the heads with zeros and keep the scale",
                )


def _check_slopes(where: str, q: Tensor, alibi_slopes: Tensor | None) -> None:
    hq = q.shape[1]
    if alibi_slopes is None:
        return
    if tuple(alibi_slopes.shape) != (hq,) or not alibi_slopes.is_floating_point():
        raise InputError(
            where,
            "alibi_slopes does not fit",
            got=f"{alibi_slopes.dtype} {list(alibi_slopes.shape)}",
            wanted=f"floating point [{hq}]",
        )
    _check_devices(where, q, alibi_slopes=alibi_slopes)


def _check_devices(where: str, q: Tensor, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != q.device:
            raise InputError(where, f"{name} is on another device than q", got=x.device, wanted=q.device)


def _check_options(
    where: str,
    q: Tensor,
    *,
    causal: str,
    window: Sequence[int],
    global_tokens: int,
    softcap: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    **_: object,
) -> None:
    if causal not in CAUSAL:
        raise InputError(where, "unknown causal", got=repr(causal), wanted=" or ".join(CAUSAL))
    if len(window) != 2 or min(window) < -1:
        raise InputError(
            where, "window must be (left, right)", got=list(window), wanted="two numbers of keys, -1 for unbounded"
        )
    if global_tokens < 0:
        raise InputError(where, "global_tokens must not be negative", got=global_tokens)
    if softcap < 0:
        raise InputError(where, "softcap must not be negative", got=softcap, wanted="0 for none")
    if not 0 <= dropout_p < 1:
        raise InputError(where, "dropout_p must lie in [0, 1)", got=dropout_p)
    if dropout_p:
        if dropout_seed is None:
            raise InputError(
                where, "dropout needs a dropout_seed", wanted="int64 [1]", fix="call tilecut.attention, which draws one"
            )
        if dropout_seed.dtype != torch.int64 or tuple(dropout_seed.shape) != (1,):
            raise InputError(
                where,
                "dropout_seed does not fit",
                got=f"{dropout_seed.dtype} {list(dropout_seed.shape)}",
                wanted="torch.int64 [1]",
            )
        _check_devices(where, q, dropout_seed=dropout_seed)
