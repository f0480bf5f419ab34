"""Fused attention, backward: three kernels that recompute the weights from the forward's logarithms of row sums.

After Dao et al., FlashAttention, arXiv 2205.14135, appendix B. With p the weights, z the dropout factors and
delta = rowsum(out * grad):

    dv = (p z)^T grad        ds = p (z grad v^T - delta)        dq = scale ds k        dk = scale ds^T q

`attention_dkdv` owns a tile of keys and runs over all the query heads of its KV head, so nothing is added atomically;
`attention_dq` owns a tile of queries and writes ds too, where a bias wants it. A row that sees no key gives nothing.
"""

import triton
import triton.language as tl

from tilecut_runtime.kernels.attention_tile import (
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
    query_range,
    store_chunks,
    visible,
    zero_chunks,
)


@triton.jit(do_not_specialize=SIZES)
def attention_delta(
    Out,
    Grad,
    Delta,
    heads,
    rows,
    out_batch,
    out_head,
    out_row,
    grad_batch,
    grad_head,
    grad_row,
    lse_batch,
    lse_head,
    E: tl.constexpr,
    E_CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Delta = rowsum(Out * Grad), float32 in the layout of Lse; programs (tiles of rows, heads of all batch rows).

    Packed rows are one long batch row: lengths do not matter here.
    """
    m = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M
    batch = tl.cast(tl.program_id(1) // heads, tl.int64)
    head = tl.cast(tl.program_id(1) % heads, tl.int64)
    local = tl.arange(0, BLOCK_M)
    inside = m + local < rows
    out = load_chunks(
        Out + batch * out_batch + head * out_head + m * out_row, local * out_row, inside, E_CHUNKS, E, True
    )
    grad = load_chunks(
        Grad + batch * grad_batch + head * grad_head + m * grad_row, local * grad_row, inside, E_CHUNKS, E, True
    )
    delta = tl.zeros([BLOCK_M], tl.float32)
    for c in tl.static_range(len(out)):
        delta += tl.sum(out[c].to(tl.float32) * grad[c].to(tl.float32), 1)
    tl.store(Delta + batch * lse_batch + head * lse_head + m + local, delta, mask=inside)


@triton.jit
def _weights(
    s,
    i,
    j,
    lse,
    KeyPadding,
    bias,
    slope,
    nq,
    nk,
    shift,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    GLOBAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Softmax weights from q k^T and Lse in log2 units, with the soft-cap's derivative; i, j and lse broadcast."""
    s, slack = adjust_scores(s, i, j, shift, bias, slope, SCALE, SOFTCAP)
    p = tl.exp2(s - lse)
    if MASKED:
        p = tl.where(visible(i, j, nq, nk, shift, CAUSAL, LEFT, RIGHT, GLOBAL), p, 0.0)
    if KeyPadding is not None:
        p = tl.where(tl.load(KeyPadding + j, mask=j < nk, other=0) != 0, p, 0.0)
    return p, slack


@triton.jit
def _load_lse(Lse, i, nq):
    """Lse in log2 units; +inf, which makes every weight 0, for rows that see no key."""
    lse = tl.load(Lse + i, mask=i < nq, other=-float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def _collect(
    m,
    n,
    j,
    k,
    v,
    dk,
    dv,
    Q,
    Grad,
    Lse,
    Delta,
    KeyPadding,
    Bias,
    slope,
    seed,
    nq,
    nk,
    max_k,
    shift,
    q_row,
    grad_row,
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
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(dk, dv) with the queries [m, m + BLOCK_M) of one head taken in; everything here is [keys, queries]."""
    rows = tl.arange(0, BLOCK_M)
    i = m + rows
    inside = i < nq
    wide = tl.cast(m, tl.int64)
    q = load_chunks(Q + wide * q_row, rows * q_row, inside, D_CHUNKS, D, MASKED)
    bias = None
    if Bias is not None:
        bias = load_bias(Bias, m, n, rows[None, :], (j - n)[:, None], nq, nk, bias_row, bias_column)
    p, slack = _weights(
        dot_chunks(k, q, PRECISION), i[None, :], j[:, None], _load_lse(Lse, i, nq)[None, :], KeyPadding, bias, slope,
        nq, nk, shift, SCALE, SOFTCAP, CAUSAL, LEFT, RIGHT, GLOBAL, MASKED,
    )  # fmt: skip
    grad = load_chunks(Grad + wide * grad_row, rows * grad_row, inside, E_CHUNKS, E, MASKED)
    dp = dot_chunks(v, grad, PRECISION)
    kept = p
    if DROPOUT > 0.0:
        factor = dropout_factor(seed, i[None, :], j[:, None], max_k, DROPOUT)
        kept = p * factor
        dp = dp * factor
    dv = add_product(dv, kept, grad, PRECISION)
    ds = p * (dp - tl.load(Delta + i, mask=inside, other=0.0)[None, :]) * slack
    return add_product(dk, ds, q, PRECISION), dv


@triton.jit(do_not_specialize=SIZES)
def attention_dkdv(
    Q,
    K,
    V,
    Grad,
    DK,
    DV,
    Lse,
    Delta,
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
    grad_batch,
    grad_head,
    grad_row,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
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
    """DK and DV of BLOCK_N keys of one KV head; arguments as in `attention_forward`, but for keys.

    heads: of K; Tiles: tiles of keys. BlockOffsets, BlockIndices: the transposed CSR, query blocks of each KV block;
    BlockBase: the first of each sequence's KV blocks. Both tile sides divide 64 with it.
    """
    sequence, kv_head, tile = find_tile(Tiles, heads, batch, n_tiles, section, False)
    if sequence < 0:
        return
    q_start, nq = find_rows(CuQ, sequence, max_q, q_batch, q_row)
    grad_start, _ = find_rows(CuQ, sequence, max_q, grad_batch, grad_row)
    lse_start, _ = find_rows(CuQ, sequence, max_q, lse_batch, 1)
    k_start, nk = find_rows(CuK, sequence, max_k, k_batch, k_row)
    v_start, _ = find_rows(CuK, sequence, max_k, v_batch, v_row)
    dk_start, _ = find_rows(CuK, sequence, max_k, dk_batch, dk_row)
    dv_start, _ = find_rows(CuK, sequence, max_k, dv_batch, dv_row)
    shift = nk - nq
    if TOP_LEFT:
        shift = 0
    n = tile * BLOCK_N
    wide_n = tl.cast(n, tl.int64)
    columns = tl.arange(0, BLOCK_N)
    j = n + columns
    wide_head = tl.cast(kv_head, tl.int64)
    if KeyPadding is not None:
        KeyPadding += tl.cast(sequence, tl.int64) * padding_batch

    k = load_chunks(K + k_start + wide_head * k_head + wide_n * k_row, columns * k_row, j < nk, D_CHUNKS, D, True)
    v = load_chunks(V + v_start + wide_head * v_head + wide_n * v_row, columns * v_row, j < nk, E_CHUNKS, E, True)
    dk = zero_chunks(BLOCK_N, D_CHUNKS)
    dv = zero_chunks(BLOCK_N, E_CHUNKS)
    g, a, b, c, d = query_range(n, tl.minimum(nk - n, BLOCK_N), nq, shift, BLOCK_M, CAUSAL, LEFT, RIGHT, GLOBAL)

    for member in range(GROUP):
        head = wide_head * GROUP + member
        q_head_start = Q + q_start + head * q_head
        grad_head_start = Grad + grad_start + head * grad_head
        lse_head_start = Lse + lse_start + head * lse_head
        delta_head_start = Delta + lse_start + head * lse_head
        slope = None
        if Slopes is not None:
            slope = tl.load(Slopes + head).to(tl.float32)
        seed = None
        if DROPOUT > 0.0:
            seed = tl.load(Seed) + (sequence * (heads * GROUP) + head)
        bias_start = None
        if Bias is not None:
            bias_start = Bias + tl.cast(sequence, tl.int64) * bias_batch + head * bias_head
        if BlockOffsets is not None:
            PARTS: tl.constexpr = SPARSE_BLOCK // BLOCK_M
            block = tile // (SPARSE_BLOCK // BLOCK_N)
            listed = BlockOffsets + head * offsets_head + tl.load(BlockBase + sequence) + block
            low = tl.load(listed) * PARTS
            high = tl.load(listed + 1) * PARTS
        else:
            for t in range(b, c):
                dk, dv = _collect(
                    t * BLOCK_M, n, j, k, v, dk, dv, q_head_start, grad_head_start, lse_head_start, delta_head_start,
                    KeyPadding, bias_start, slope, seed, nq, nk, max_k, shift, q_row, grad_row, bias_row, bias_column,
                    D, D_CHUNKS, E, E_CHUNKS, SCALE, SOFTCAP, CAUSAL, LEFT, RIGHT, GLOBAL, DROPOUT, PRECISION,
                    BLOCK_M, False,
                )  # fmt: skip
            low = 0
            high = g + (b - a) + (d - c)
        for t in range(low, high):
            if BlockOffsets is not None:
                entry = t // PARTS
                m = tl.load(BlockIndices + entry) * SPARSE_BLOCK + (t - entry * PARTS) * BLOCK_M
            else:
                m = masked_tile(t, g, a, b, c) * BLOCK_M
            dk, dv = _collect(
                m, n, j, k, v, dk, dv, q_head_start, grad_head_start, lse_head_start, delta_head_start,
                KeyPadding, bias_start, slope, seed, nq, nk, max_k, shift, q_row, grad_row, bias_row, bias_column,
                D, D_CHUNKS, E, E_CHUNKS, SCALE, SOFTCAP, CAUSAL, LEFT, RIGHT, GLOBAL, DROPOUT, PRECISION,
                BLOCK_M, True,
            )  # fmt: skip

    store_chunks(
        DK + dk_start + wide_head * dk_head + wide_n * dk_row, columns * dk_row, j < nk, dk, SCALE, D_CHUNKS, D
    )
    store_chunks(DV + dv_start + wide_head * dv_head + wide_n * dv_row, columns * dv_row, j < nk, dv, 1.0, E_CHUNKS, E)


@triton.jit
def _descend(
    n,
    m,
    i,
    q,
    grad,
    lse,
    delta,
    dq,
    K,
    V,
    DBias,
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
    dbias_row,
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
    """dq with the keys [n, n + BLOCK_N) taken in; everything here is [queries, keys]."""
    columns = tl.arange(0, BLOCK_N)
    j = n + columns
    inside = j < nk
    wide = tl.cast(n, tl.int64)
    k = load_chunks(K + wide * k_row, columns * k_row, inside, D_CHUNKS, D, MASKED)
    bias = None
    if Bias is not None:
        bias = load_bias(Bias, m, n, (i - m)[:, None], columns[None, :], nq, nk, bias_row, bias_column)
    p, slack = _weights(
        dot_chunks(q, k, PRECISION), i[:, None], j[None, :], lse[:, None], KeyPadding, bias, slope,
        nq, nk, shift, SCALE, SOFTCAP, CAUSAL, LEFT, RIGHT, GLOBAL, MASKED,
    )  # fmt: skip
    v = load_chunks(V + wide * v_row, columns * v_row, inside, E_CHUNKS, E, MASKED)
    dp = dot_chunks(grad, v, PRECISION)
    if DROPOUT > 0.0:
        dp = dp * dropout_factor(seed, i[:, None], j[None, :], max_k, DROPOUT)
    ds = p * (dp - delta[:, None])
    if DBias is not None:
        place = DBias + wide + ((i - m)[:, None] * dbias_row + columns[None, :])
        tl.store(place, ds.to(DBias.dtype.element_ty), mask=(i < nq)[:, None] & inside[None, :])
    return add_product(dq, ds * slack, k, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def attention_dq(
    Q,
    K,
    V,
    Grad,
    DQ,
    DBias,
    Lse,
    Delta,
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
    grad_batch,
    grad_head,
    grad_row,
    dq_batch,
    dq_head,
    dq_row,
    lse_batch,
    lse_head,
    padding_batch,
    bias_batch,
    bias_head,
    bias_row,
    bias_column,
    offsets_head,
    dbias_batch,
    dbias_head,
    dbias_row,
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
    """DQ of BLOCK_M queries of one head, and of a bias [B, heads, Sq, Sk] the tiles that are seen; as the forward."""
    sequence, head, tile = find_tile(Tiles, heads, batch, n_tiles, section, CAUSAL)
    if sequence < 0:
        return
    q_start, nq = find_rows(CuQ, sequence, max_q, q_batch, q_row)
    grad_start, _ = find_rows(CuQ, sequence, max_q, grad_batch, grad_row)
    dq_start, _ = find_rows(CuQ, sequence, max_q, dq_batch, dq_row)
    lse_start, _ = find_rows(CuQ, sequence, max_q, lse_batch, 1)
    k_start, nk = find_rows(CuK, sequence, max_k, k_batch, k_row)
    v_start, _ = find_rows(CuK, sequence, max_k, v_batch, v_row)
    shift = nk - nq
    if TOP_LEFT:
        shift = 0
    m = tile * BLOCK_M
    wide_m = tl.cast(m, tl.int64)
    wide_head = tl.cast(head, tl.int64)
    wide_sequence = tl.cast(sequence, tl.int64)
    rows = tl.arange(0, BLOCK_M)
    i = m + rows
    inside = i < nq
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
        KeyPadding += wide_sequence * padding_batch
    if Bias is not None:
        Bias += wide_sequence * bias_batch + wide_head * bias_head
    if DBias is not None:
        DBias += wide_sequence * dbias_batch + wide_head * dbias_head + wide_m * dbias_row

    q = load_chunks(Q + q_start + wide_head * q_head + wide_m * q_row, rows * q_row, inside, D_CHUNKS, D, True)
    grad = load_chunks(
        Grad + grad_start + wide_head * grad_head + wide_m * grad_row, rows * grad_row, inside, E_CHUNKS, E, True
    )
    lse = _load_lse(Lse + lse_start + wide_head * lse_head, i, nq)
    delta = tl.load(Delta + lse_start + wide_head * lse_head + i, mask=inside, other=0.0)
    dq = zero_chunks(BLOCK_M, D_CHUNKS)

    if BlockOffsets is not None:
        PARTS: tl.constexpr = SPARSE_BLOCK // BLOCK_N
        block = tile // (SPARSE_BLOCK // BLOCK_M)
        listed = BlockOffsets + wide_head * offsets_head + tl.load(BlockBase + sequence) + block
        low = tl.load(listed) * PARTS
        high = tl.load(listed + 1) * PARTS
    else:
        g, a, b, c, d = key_range(m, tl.minimum(nq - m, BLOCK_M), nk, shift, BLOCK_N, CAUSAL, LEFT, RIGHT, GLOBAL)
        for t in range(b, c):
            dq = _descend(
                t * BLOCK_N, m, i, q, grad, lse, delta, dq, K, V, DBias, KeyPadding, Bias, slope, seed, nq, nk, max_k,
                shift, k_row, v_row, bias_row, bias_column, dbias_row, D, D_CHUNKS, E, E_CHUNKS, SCALE, SOFTCAP,
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
        dq = _descend(
            n, m, i, q, grad, lse, delta, dq, K, V, DBias, KeyPadding, Bias, slope, seed, nq, nk, max_k,
            shift, k_row, v_row, bias_row, bias_column, dbias_row, D, D_CHUNKS, E, E_CHUNKS, SCALE, SOFTCAP,
            CAUSAL, LEFT, RIGHT, GLOBAL, DROPOUT, PRECISION, BLOCK_N, True,
        )  # fmt: skip

    store_chunks(DQ + dq_start + wide_head * dq_head + wide_m * dq_row, rows * dq_row, inside, dq, SCALE, D_CHUNKS, D)
