"""Fused attention, forward: out = softmax(scores) v and the logarithm of each row's sum, one pass over the keys.

After Dao, FlashAttention-2, arXiv 2307.08691. One program makes BLOCK_M rows of one head. It runs over the tiles of
keys that all its rows see whole, without a mask, then over those that need one (`attention_tile.split_range`); with a
CSR of blocks, over the listed blocks alone.

A row that sees no key gives 0 and a logarithm of -inf.
"""

import triton
import triton.language as tl

from tilecut_runtime.kernels.attention_tile import (
    LN2,
    LOG2E,
    SIZES,
    SPARSE_BLOCK,
    add_product,
    adjust_scores,
    dot_chunks,
    dropout_factor,
    find_rows,
    find_tile,
    key_range,
    load_bias,
    load_chunks,
    masked_tile,
    scale_rows,
    store_chunks,
    visible,
    zero_chunks,
)


@triton.jit
def _attend(
    n,
    m,
    i,
    q,
    acc,
    top,
    total,
    K,
    V,
    KeyPadding,
    Bias,
    slope,
    seed,
    nq,
    nk,
    max_k,
    shift,
    k_row,
    v_row,
    bias_row,
    bias_column,
    D: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    E: tl.constexpr,
    E_CHUNKS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    GLOBAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The running (acc, top, total) with the keys [n, n + BLOCK_N) taken in."""
    columns = tl.arange(0, BLOCK_N)
    j = n + columns
    inside = j < nk
    k = load_chunks(K + tl.cast(n, tl.int64) * k_row, columns * k_row, inside, D_CHUNKS, D, MASKED)
    s = dot_chunks(q, k, PRECISION)
    # Without a term to add, the scale is left to the multiply-add inside exp2.
    LATE: tl.constexpr = SCALE > 0.0 and SOFTCAP == 0.0 and Bias is None and slope is None
    if LATE:
        factor: tl.constexpr = SCALE * LOG2E
    else:
        factor: tl.constexpr = 1.0
        bias = None
        if Bias is not None:
            bias = load_bias(Bias, m, n, (i - m)[:, None], columns[None, :], nq, nk, bias_row, bias_column)
        s, _slack = adjust_scores(s, i[:, None], j[None, :], shift, bias, slope, SCALE, SOFTCAP)
    if MASKED:
        s = tl.where(visible(i[:, None], j[None, :], nq, nk, shift, CAUSAL, LEFT, RIGHT, GLOBAL), s, -float("inf"))
    if KeyPadding is not None:
        s = tl.where((tl.load(KeyPadding + j, mask=inside, other=0) != 0)[None, :], s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * factor)
    # -inf - -inf is no number
    finite_top = new_top
    if MASKED or KeyPadding is not None or Bias is not None:
        finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(s * factor - finite_top[:, None])
    shrink = tl.exp2(top - finite_top)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT > 0.0:
        p = p * dropout_factor(seed, i[:, None], j[None, :], max_k, DROPOUT)
    acc = scale_rows(acc, shrink)
    v = load_chunks(V + tl.cast(n, tl.int64) * v_row, columns * v_row, inside, E_CHUNKS, E, MASKED)
    return add_product(acc, p, v, PRECISION), new_top, total


@triton.jit(do_not_specialize=SIZES)
def attention_forward(
    Q,
    K,
    V,
    Out,
    Lse,
    CuQ,
    CuK,
    Tiles,
    KeyPadding,
    Bias,
    Slopes,
    BlockOffsets,
    BlockIndices,
    BlockBase,
    Seed,
    heads,
    batch,
    n_tiles,
    section,
    max_q,
    max_k,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    lse_batch,
    lse_head,
    padding_batch,
    bias_batch,
    bias_head,
    bias_row,
    bias_column,
    offsets_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_CHUNKS: tl.constexpr,
    E: tl.constexpr,
    E_CHUNKS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    GLOBAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Out and Lse of BLOCK_M rows of one head; one program for each tile and head, in one dimension.

    Q, K, V, Out: 16-bit or float32, by strides; Lse: float32, rows contiguous. Tiles: int32 [n, 2] of (sequence, tile).
    KeyPadding: uint8 [B, Sk]. Bias: by strides, 0 where it broadcasts. Slopes: [heads]. BlockOffsets, BlockIndices: the
    CSR of the 64 x 64 blocks, BlockBase int32 [sequences] the first of each sequence's query blocks; both tile
    sides divide 64 then. Seed: int64 [1].
    """
    sequence, head, tile = find_tile(Tiles, heads, batch, n_tiles, section, CAUSAL)
    if sequence < 0:
        return
    q_start, nq = find_rows(CuQ, sequence, max_q, q_batch, q_row)
    k_start, nk = find_rows(CuK, sequence, max_k, k_batch, k_row)
    v_start, _ = find_rows(CuK, sequence, max_k, v_batch, v_row)
    out_start, _ = find_rows(CuQ, sequence, max_q, out_batch, out_row)
    lse_start, _ = find_rows(CuQ, sequence, max_q, lse_batch, 1)
    shift = nk - nq
    if TOP_LEFT:
        shift = 0
    m = tile * BLOCK_M
    wide_m = tl.cast(m, tl.int64)
    wide_head = tl.cast(head, tl.int64)
    rows = tl.arange(0, BLOCK_M)
    i = m + rows
    kv_head = wide_head // GROUP
    K += k_start + kv_head * k_head
    V += v_start + kv_head * v_head
    slope = None
    if Slopes is not None:
        slope = tl.load(Slopes + head).to(tl.float32)
    seed = None
    if DROPOUT > 0.0:
        seed = tl.load(Seed) + (sequence * heads + head)
    if KeyPadding is not None:
        KeyPadding += tl.cast(sequence, tl.int64) * padding_batch
    if Bias is not None:
        Bias += tl.cast(sequence, tl.int64) * bias_batch + wide_head * bias_head

    q = load_chunks(Q + q_start + wide_head * q_head + wide_m * q_row, rows * q_row, i < nq, D_CHUNKS, D, True)
    acc = zero_chunks(BLOCK_M, E_CHUNKS)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    if BlockOffsets is not None:
        PARTS: tl.constexpr = SPARSE_BLOCK // BLOCK_N
        block = tile // (SPARSE_BLOCK // BLOCK_M)
        listed = BlockOffsets + wide_head * offsets_head + tl.load(BlockBase + sequence) + block
        low = tl.load(listed) * PARTS
        high = tl.load(listed + 1) * PARTS
    else:
        g, a, b, c, d = key_range(m, tl.minimum(nq - m, BLOCK_M), nk, shift, BLOCK_N, CAUSAL, LEFT, RIGHT, GLOBAL)
        for t in range(b, c):
            acc, top, total = _attend(
                t * BLOCK_N, m, i, q, acc, top, total, K, V, KeyPadding, Bias, slope, seed, nq, nk, max_k, shift,
                k_row, v_row, bias_row, bias_column, D, D_CHUNKS, E, E_CHUNKS, SCALE, SOFTCAP,
                CAUSAL, LEFT, RIGHT, GLOBAL, DROPOUT, PRECISION, BLOCK_N, False,
            )  # fmt: skip
        low = 0
        high = g + (b - a) + (d - c)
    for t in range(low, high):
        if BlockOffsets is not None:
            entry = t // PARTS
            n = tl.load(BlockIndices + entry) * SPARSE_BLOCK + (t - entry * PARTS) * BLOCK_N
        else:
            n = masked_tile(t, g, a, b, c) * BLOCK_N
        acc, top, total = _attend(
            n, m, i, q, acc, top, total, K, V, KeyPadding, Bias, slope, seed, nq, nk, max_k, shift,
            k_row, v_row, bias_row, bias_column, D, D_CHUNKS, E, E_CHUNKS, SCALE, SOFTCAP,
            CAUSAL, LEFT, RIGHT, GLOBAL, DROPOUT, PRECISION, BLOCK_N, True,
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)
    Lse += lse_start + wide_head * lse_head
    tl.store(Lse + i, (top + tl.log2(total)) * LN2, mask=i < nq)
    store_chunks(
        Out + out_start + wide_head * out_head + wide_m * out_row,
        rows * out_row, i < nq, acc, (1.0 / total)[:, None], E_CHUNKS, E,
    )  # fmt: skip
