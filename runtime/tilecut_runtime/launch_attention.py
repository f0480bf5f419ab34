"""Attention on a GPU: the launches of the Triton kernels behind `tilecut::attention` and `tilecut::attention_varlen`.

The ops call `forward` and `backward` with checked arguments; what they mean is said in `attention`. Both make a list of
`Launch` and start it; `plan_forward` only makes it, so that a compiler can build what a GPU will be asked for (tensors
may be on the meta device then). The tile comes from
the table of `kernels/choose_tile`, packed sequences get a list of tiles (`list_tiles`), and few queries the kernels of
`kernels/attention_decode`. Products of float32 are exact unless `torch.backends.cuda.matmul` allows TF32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from tilecut_runtime.kernels.attention_backward import attention_delta, attention_dkdv, attention_dq
from tilecut_runtime.kernels.attention_decode import attention_combine, attention_decode
from tilecut_runtime.kernels.attention_forward import attention_forward
from tilecut_runtime.kernels.choose_tile import Tile, choose_tile
from tilecut_runtime.kernels.split_width import split_width
from tilecut_runtime.list_tiles import list_tiles
from tilecut_runtime.transpose_blocks import BLOCK, first_blocks, transpose_blocks

# Rows of a decode tile: the query heads of a KV head times their queries.
DECODE_ROWS = 16
MAX_SPLITS = 64
# Offsets within a tile are int32.
WIDEST_ROW = 2**31 // 256


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: `grid` programs with a tile's warps and stages."""

    kernel: Any
    grid: tuple[int, ...]
    tile: Tile
    arguments: Mapping[str, Any]

    def run(self, warmup: bool = False) -> Any:
        """Start the programs on the current device, or only compile them; returns triton's compiled kernel."""
        return self.kernel.run(
            grid=self.grid,
            warmup=warmup,
            **self.arguments,
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
            enable_fp_fusion=True,
        )


@dataclass(frozen=True)
class Problem:
    """The arguments that `forward` and `backward` share; see `attention` for their meaning.

    Dense: q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, E]. Packed, with cu_q and cu_k int32 [N + 1]: [T, H, .].
    key_padding and bias are of dense tensors; max_q and max_k are Sq and Sk there, and bounds of the lengths of packed
    ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    _: KW_ONLY
    max_q: int
    max_k: int
    scale: float
    causal: str
    window: Sequence[int]
    global_tokens: int
    softcap: float
    dropout_p: float
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    key_padding: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    block_offsets: Tensor | None = None
    block_indices: Tensor | None = None
    dropout_seed: Tensor | None = None

    @property
    def batch(self) -> int:
        """Batch rows or packed sequences."""
        return self.q.shape[0] if self.cu_q is None else len(self.cu_q) - 1

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def group(self) -> int:
        """Query heads to a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """[B, Hq, Sq], or packed [Hq, Tq]."""
        return (self.heads, len(self.q)) if self.cu_q is not None else tuple(self.q.shape[:3])

    @property
    def options(self) -> dict[str, Any]:
        """The constexpr arguments that every kernel takes."""
        exact = torch.get_float32_matmul_precision() == "highest"
        left, right = self.window
        return {
            "GROUP": self.group,
            **widths("D", self.k.shape[-1]),
            **widths("E", self.v.shape[-1]),
            "SCALE": float(self.scale),
            "SOFTCAP": float(self.softcap),
            "CAUSAL": self.causal != "none",
            "TOP_LEFT": self.causal == "top_left",
            "LEFT": left,
            "RIGHT": right,
            # Global tokens lift the window, and nothing else.
            "GLOBAL": self.global_tokens if left >= 0 or right >= 0 else 0,
            "PRECISION": "ieee" if exact or self.q.dtype != torch.float32 else "tf32",
        }

    @property
    def inputs(self) -> dict[str, Any]:
        """The tensors and sizes that every kernel over scores takes."""
        return {
            "Q": self.q,
            "K": self.k,
            "V": self.v,
            "CuQ": self.cu_q,
            "CuK": self.cu_k,
            "KeyPadding": None if self.key_padding is None else self.key_padding.view(torch.uint8),
            "Bias": self.bias,
            "Slopes": self.alibi_slopes,
            "max_q": self.max_q,
            "max_k": self.max_k,
            **self.strides("q", self.q),
            **self.strides("k", self.k),
            **self.strides("v", self.v),
            "padding_batch": 0 if self.key_padding is None else self.key_padding.stride(0),
            **bias_strides(self.bias),
        }

    def strides(self, name: str, x: Tensor) -> dict[str, int]:
        """Strides of batch, head and row under the kernels' names."""
        if self.cu_q is None:
            batch, head, row = x.stride()[:3]
        else:
            batch, (row, head) = 0, x.stride()[:2]
        return {f"{name}_batch": batch, f"{name}_head": head, f"{name}_row": row}

    def lse_strides(self) -> dict[str, int]:
        """Strides of Lse: rows are contiguous."""
        rows = self.lse_shape[-1]
        return {"lse_batch": 0 if self.cu_q is not None else self.heads * rows, "lse_head": rows}

    def lengths(self, keys: bool) -> Tensor:
        """The rows of every sequence, on the device."""
        cu = self.cu_k if keys else self.cu_q
        if cu is None:
            return torch.full((self.batch,), self.max_k if keys else self.max_q, device=self.q.device)
        return (cu[1:] - cu[:-1]).long()

    def tile(self, direction: str, tiles: Mapping[str, Tile] | None) -> Tile:
        """The tile to launch with; blocks of the CSR bound it."""
        if tiles is not None:
            chosen = tiles[direction]
        else:
            width = max(self.k.shape[-1], self.v.shape[-1])
            chosen = choose_tile(architecture(self.q.device), direction, width, 8 * self.q.element_size())
        if self.block_offsets is None or max(chosen.block_m, chosen.block_n) <= BLOCK:
            return chosen
        return Tile(min(chosen.block_m, BLOCK), min(chosen.block_n, BLOCK), 4, chosen.num_stages)

    def order(self, block: int, keys: bool) -> tuple[int, dict[str, Any]]:
        """(programs, arguments that say which program does what) of a kernel whose tiles are `block` queries or keys."""
        heads = self.k.shape[1] if keys else self.heads
        longest = self.max_k if keys else self.max_q
        n_tiles = -(-longest // block)
        tiles = None
        programs = n_tiles * heads * self.batch
        if self.cu_q is not None:
            tiles = list_tiles(self.lengths(keys), len(self.k if keys else self.q), longest, block, self._spans(keys))
            programs = len(tiles) * heads
        # A head's programs read the keys and values again and again; those of a tile of keys its queries.
        rows = self.max_q * self.group if keys else self.max_k
        read = rows * (self.k.shape[-1] + self.v.shape[-1]) * self.q.element_size()
        section = max(1, cache_bytes(self.q.device) // 2 // max(read, 1)) * (1 if keys else self.group)
        return programs, {
            "Tiles": tiles,
            "heads": heads,
            "batch": self.batch,
            "n_tiles": n_tiles,
            "section": min(section, max(1, heads * self.batch)),
        }

    def _spans(self, keys: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What rows work on, for `list_tiles`: keys of a query, or queries of a key."""
        nq, nk = self.lengths(False), self.lengths(True)
        others = nq if keys else nk
        shift = torch.zeros_like(nq) if self.causal == "top_left" else nk - nq
        left, right = (w if w >= 0 else max(self.max_q, self.max_k) for w in self.window)
        right = 0 if self.causal != "none" else right
        return (others, right + shift, left - shift) if keys else (others, left - shift, right + shift)

    def sparse(self, transposed: bool = False) -> dict[str, Any]:
        """The CSR of blocks under the kernels' names."""
        offsets, indices = self.block_offsets, self.block_indices
        if offsets is None or indices is None:
            return {"BlockOffsets": None, "BlockIndices": None, "BlockBase": None, "offsets_head": 0}
        base = first_blocks(self.lengths(False))
        if transposed:
            key_base = first_blocks(self.lengths(True))
            rows = self.max_k * self.batch if self.cu_q is None else len(self.k)
            offsets, indices = transpose_blocks(offsets, indices, base, key_base, rows // BLOCK + self.batch)
            base = key_base
        return {
            "BlockOffsets": offsets,
            "BlockIndices": indices,
            "BlockBase": base,
            "offsets_head": offsets.stride(0) if len(offsets) > 1 else 0,
        }

    @property
    def dropout(self) -> dict[str, Any]:
        """The seed, and the probability that a pair is dropped."""
        return {"Seed": self.dropout_seed if self.dropout_p else None, "DROPOUT": float(self.dropout_p)}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiles: Mapping[str, Tile] | None = None,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out like q with v's width, contiguous; lse float32 [B, Hq, Sq] or, packed, [Hq, Tq].

    given: what `Problem` holds. tiles: by direction ("forward", "decode"), instead of the table's.
    """
    out, lse, launches = plan_forward(q, k, v, tiles=tiles, **given)
    _start(launches, q.device)
    return out, lse


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, *, tiles: Mapping[str, Tile] | None = None, **given: Any
) -> tuple[Tensor, Tensor, list[Launch]]:
    """What `forward` returns, not yet computed, and the launches that compute it."""
    p = Problem(_rows(q), _rows(k), _rows(v), **given)
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(p.lse_shape, dtype=torch.float32, device=q.device)
    if not p.batch:
        return out, lse, []
    if p.max_q * p.group <= DECODE_ROWS and p.block_offsets is None and not p.dropout_p:
        return out, lse, _decode(p, out, lse, tiles)
    tile = p.tile("forward", tiles)
    programs, order = p.order(tile.block_m, False)
    arguments = {**p.inputs, **p.options, **p.dropout, **order, **p.sparse(), "Out": out, "Lse": lse}
    arguments |= {**p.strides("out", out), **p.lse_strides(), **_sides(tile)}
    return out, lse, [Launch(attention_forward, (programs,), tile, arguments)]


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    need_dbias: bool = True,
    tiles: Mapping[str, Tile] | None = None,
    **given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias), contiguous and of their tensors' dtypes; dbias is None without a bias or a need for it.

    out, lse: what `forward` gave for the same arguments. tiles: of the directions "dq" and "dkdv".
    """
    p = Problem(_rows(q), _rows(k), _rows(v), **given)
    grad, out = _rows(grad), _rows(out)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not p.batch:
        return dq, dk, dv, None if p.bias is None or not need_dbias else torch.zeros_like(p.bias)
    delta = torch.empty(p.lse_shape, dtype=torch.float32, device=q.device)
    shared = {"Lse": lse.contiguous(), "Delta": delta, "Grad": grad, **p.strides("grad", grad), **p.lse_strides()}
    shared |= {**p.inputs, **p.options, **p.dropout}

    rows = p.lse_shape[-1]
    planes = delta.numel() // max(rows, 1)
    tile = Tile(64, 0, 4, 1)
    arguments = {"Out": out, "Grad": grad, "Delta": delta, "heads": p.heads, "rows": rows, "BLOCK_M": tile.block_m}
    arguments |= {**p.strides("out", out), **p.strides("grad", grad), **p.lse_strides(), **widths("E", v.shape[-1])}
    launches = [Launch(attention_delta, (-(-rows // tile.block_m), planes), tile, arguments)]

    tile = p.tile("dkdv", tiles)
    programs, order = p.order(tile.block_n, True)
    arguments = {**shared, **order, **p.sparse(transposed=True), "DK": dk, "DV": dv}
    arguments |= {**p.strides("dk", dk), **p.strides("dv", dv), **_sides(tile)}
    launches.append(Launch(attention_dkdv, (programs,), tile, arguments))

    tile = p.tile("dq", tiles)
    dscores = _dscores(p) if need_dbias else None
    programs, order = p.order(tile.block_m, False)
    batch, head, row = (0, 0, 0) if dscores is None else dscores.stride()[:3]
    arguments = {**shared, **order, **p.sparse(), "DQ": dq, **p.strides("dq", dq), **_sides(tile), "DBias": dscores}
    arguments |= {"dbias_batch": batch, "dbias_head": head, "dbias_row": row}
    launches.append(Launch(attention_dq, (programs,), tile, arguments))
    _start(launches, q.device)
    dbias = None
    if dscores is not None and p.bias is not None:
        dbias = dscores.sum_to_size(p.bias.shape).to(p.bias.dtype)
    return dq, dk, dv, dbias


def _dscores(p: Problem) -> Tensor | None:
    """Where the dq kernel writes the gradient of the scores: zeros, since it leaves out the tiles that nobody sees."""
    if p.bias is None:
        return None
    shape = (p.batch, p.heads, p.max_q, p.max_k)
    # What is summed over broadcast rows and heads is summed in float32.
    dtype = p.bias.dtype if tuple(p.bias.shape) == shape else torch.float32
    return torch.zeros(shape, dtype=dtype, device=p.q.device)


def _decode(p: Problem, out: Tensor, lse: Tensor, tiles: Mapping[str, Tile] | None) -> list[Launch]:
    """Split the keys over so many programs that the device is full, then combine their parts."""
    tile = p.tile("decode", tiles)
    kv_heads, width = p.k.shape[1], p.v.shape[-1]
    pairs = p.batch * kv_heads
    wanted = 2 * processors(p.q.device) // max(pairs, 1)
    splits = max(1, min(wanted, -(-p.max_k // tile.block_n), MAX_SPLITS))
    parts = torch.empty((pairs, splits, DECODE_ROWS, width), dtype=torch.float32, device=p.q.device)
    part_lse = torch.empty(parts.shape[:3], dtype=torch.float32, device=p.q.device)
    sizes = {"Parts": parts, "PartLse": part_lse, "kv_heads": kv_heads, "splits": splits}
    split = {**p.inputs, **p.options, **sizes, "BLOCK_M": DECODE_ROWS, "BLOCK_N": tile.block_n}
    combine = {**sizes, "Out": out, "Lse": lse, "CuQ": p.cu_q, "max_q": p.max_q, "GROUP": p.group}
    combine |= {**p.strides("out", out), **p.lse_strides(), **widths("E", width)}
    combine |= {"BLOCK_M": DECODE_ROWS, "SPLITS": MAX_SPLITS}
    return [
        Launch(attention_decode, (pairs * splits,), tile, split),
        Launch(attention_combine, (pairs, p.max_q * p.group), tile, combine),
    ]


def _start(launches: Sequence[Launch], device: torch.device) -> None:
    """Start what has programs, on the tensors' device."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            if 0 not in launch.grid:
                launch.run()


def widths(name: str, width: int) -> dict[str, Any]:
    """A width and its chunks under the kernels' names."""
    return {name: width, f"{name}_CHUNKS": split_width(width)}


def bias_strides(bias: Tensor | None) -> dict[str, int]:
    """Strides of a bias, 0 where it broadcasts."""
    names = ("bias_batch", "bias_head", "bias_row", "bias_column")
    if bias is None:
        return dict.fromkeys(names, 0)
    return {n: 0 if size == 1 else stride for n, size, stride in zip(names, bias.shape, bias.stride())}


def _sides(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}


def _rows(x: Tensor) -> Tensor:
    """The tensor as the kernels read it: contiguous within rows, and rows no further apart than int32 reaches."""
    return x if x.stride(-1) == 1 and max(x.stride()[-3:-1]) < WIDEST_ROW else x.contiguous()


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942": the table's name of a device. Without one, in the interpreter, any tile will do."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cache_bytes(device: torch.device) -> int:
    """Bytes of a device's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
