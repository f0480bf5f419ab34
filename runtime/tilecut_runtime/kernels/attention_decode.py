"""Fused attention for few queries: the keys are shared out over programs, whose parts a second kernel combines.

After Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023). The query heads of a KV head, and their few queries, are the
rows of one tile: each key is read once. Part s of a row holds softmax(part of the scores) v and the log2 of its sum;
the parts, weighted by exp2 of those logarithms, add up to the whole.
"""

import triton
import triton.language as tl

from tilecut_runtime.kernels.attention_tile import (
    LN2,
    SIZES,
    add_product,
    adjust_scores,
    dot_chunks,
    find_rows,
    key_range,
    load_chunks,
    masked_tile,
    scale_rows,
    store_chunks,
    visible,
    zero_chunks,
)


@triton.jit(do_not_specialize=SIZES)
def attention_decode(
    Q,
    K,
    V,
    Parts,
    PartLse,
    CuQ,
    CuK,
    KeyPadding,
    Bias,
    Slopes,
    kv_heads,
    splits,
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
    padding_batch,
    bias_batch,
    bias_head,
    bias_row,
    bias_column,
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One part of one KV head of one sequence; programs (sequence, KV head, split) in one dimension, split fastest.

    Row r is query r // GROUP of the KV head's member r % GROUP; max_q * GROUP <= BLOCK_M. Parts: float32
    [sequences, kv_heads, splits, BLOCK_M, E]; PartLse the same without E. Other arguments as in `attention_forward`.
    """
    pid = tl.program_id(0)
    split = pid % splits
    kv_head = tl.cast(pid // splits % kv_heads, tl.int64)
    sequence = pid // splits // kv_heads
    q_start, nq = find_rows(CuQ, sequence, max_q, q_batch, q_row)
    k_start, nk = find_rows(CuK, sequence, max_k, k_batch, k_row)
    v_start, _ = find_rows(CuK, sequence, max_k, v_batch, v_row)
    shift = nk - nq
    if TOP_LEFT:
        shift = 0
    rows = tl.arange(0, BLOCK_M)
    i = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    K += k_start + kv_head * k_head
    V += v_start + kv_head * v_head
    slope = None
    if Slopes is not None:
        slope = tl.load(Slopes + head).to(tl.float32)[:, None]
    if KeyPadding is not None:
        KeyPadding += tl.cast(sequence, tl.int64) * padding_batch
    if Bias is not None:
        Bias += tl.cast(sequence, tl.int64) * bias_batch

    q = load_chunks(Q + q_start, head * q_head + i * q_row, i < nq, D_CHUNKS, D, True)
    acc = zero_chunks(BLOCK_M, E_CHUNKS)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    g, a, _, _, d = key_range(0, nq, nk, shift, BLOCK_N, CAUSAL, LEFT, RIGHT, GLOBAL)
    # Here the tiles seen whole are masked like the others: the time goes into reading them.
    share = tl.cdiv(g + d - a, splits)
    for t in range(split * share, tl.minimum(split * share + share, g + d - a)):
        n = masked_tile(t, g, a, a, a) * BLOCK_N
        columns = tl.arange(0, BLOCK_N)
        j = n + columns
        inside = j < nk
        wide_n = tl.cast(n, tl.int64)
        k = load_chunks(K + wide_n * k_row, columns * k_row, inside, D_CHUNKS, D, True)
        bias = None
        if Bias is not None:
            place = (head * bias_head + i * bias_row)[:, None] + (j * bias_column)[None, :]
            bias = tl.load(Bias + place, mask=(i < nq)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        s = dot_chunks(q, k, PRECISION)
        s, _slack = adjust_scores(s, i[:, None], j[None, :], shift, bias, slope, SCALE, SOFTCAP)
        s = tl.where(visible(i[:, None], j[None, :], nq, nk, shift, CAUSAL, LEFT, RIGHT, GLOBAL), s, -float("inf"))
        if KeyPadding is not None:
            s = tl.where((tl.load(KeyPadding + j, mask=inside, other=0) != 0)[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s - finite_top[:, None])
        shrink = tl.exp2(top - finite_top)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        v = load_chunks(V + wide_n * v_row, columns * v_row, inside, E_CHUNKS, E, True)
        acc = add_product(scale_rows(acc, shrink), p, v, PRECISION)

    total = tl.where(total == 0.0, 1.0, total)
    first = tl.cast(pid, tl.int64) * BLOCK_M
    tl.store(PartLse + first + rows, top + tl.log2(total))
    store_chunks(Parts + first * E, rows * E, i < nq, acc, (1.0 / total)[:, None], E_CHUNKS, E)


@triton.jit(do_not_specialize=SIZES)
def attention_combine(
    Parts,
    PartLse,
    Out,
    Lse,
    CuQ,
    kv_heads,
    splits,
    max_q,
    out_batch,
    out_head,
    out_row,
    lse_batch,
    lse_head,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    E_CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Out and Lse of one row from its parts; programs (sequence and KV head, row). SPLITS: a power of two >= splits."""
    pid = tl.program_id(0)
    row = tl.program_id(1)
    sequence = pid // kv_heads
    i = row // GROUP
    head = tl.cast(pid % kv_heads * GROUP + row % GROUP, tl.int64)
    out_start, nq = find_rows(CuQ, sequence, max_q, out_batch, out_row)
    lse_start, _ = find_rows(CuQ, sequence, max_q, lse_batch, 1)
    if i >= nq:
        return
    part = tl.arange(0, SPLITS)
    present = part < splits
    place = (tl.cast(pid, tl.int64) * splits + part) * BLOCK_M + row
    lse = tl.load(PartLse + place, mask=present, other=-float("inf"))
    top = tl.max(lse, 0)
    finite_top = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(lse - finite_top)
    total = tl.sum(weight, 0)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(Lse + lse_start + head * lse_head + i, (top + tl.log2(total)) * LN2)
    parts = load_chunks(Parts, place * E, present, E_CHUNKS, E, True)
    whole = ()
    for c in tl.static_range(len(parts)):
        whole = whole + (tl.sum(parts[c] * weight[:, None], 0)[None, :],)
    Out += out_start + head * out_head + tl.cast(i, tl.int64) * out_row
    store_chunks(Out, tl.arange(0, 1), tl.arange(0, 1) == 0, whole, 1.0 / total, E_CHUNKS, E)
