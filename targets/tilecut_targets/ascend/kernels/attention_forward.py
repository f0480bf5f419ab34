"""Fused attention for Ascend, forward: out = softmax(scale q k^T) v, one pass over the keys. Imports only triton.

After Dao, FlashAttention-2, arXiv 2307.08691. The programs are as many as the launch says (one for each cube core); each
makes every n-th tile of BLOCK_M rows of one head, so that one binary serves all batches, head counts and lengths.

Why not the kernel of `tilecut_runtime.kernels`: it holds a head width in chunks of powers of two, as tuples, which the
language of triton-ascend 3.2 (that of Triton 3.2) does not know. Here a width is held whole, since Ascend's cube
takes any multiple of 16.

The keys that every row of a tile sees whole come first, without the masks of the band's edge and of the lengths' end, since
masking is work of the vector cores, which the cube waits for; then the others, in a second loop.

Masked scores are -1e30 rather than -inf, so that no difference of infinities comes up; a row that sees no key
gives 0, as `tilecut::attention` says.
"""

import triton
import triton.language as tl

MASKED: tl.constexpr = tl.constexpr(-1.0e30)
# Above it a row has seen a key.
SEEN: tl.constexpr = tl.constexpr(-1.0e29)


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    K,
    V,
    KeyPadding,
    first,
    last,
    nk,
    i,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The running (acc, total, top) with the keys [first, last) taken in; i: the queries' places among the keys."""
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    for n in range(first, last, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        if TAIL:
            k = tl.load(K + j[:, None] * D + d[None, :], mask=j[:, None] < nk, other=0.0)
            v = tl.load(V + j[:, None] * E + e[None, :], mask=j[:, None] < nk, other=0.0)
        else:
            k = tl.load(K + j[:, None] * D + d[None, :])
            v = tl.load(V + j[:, None] * E + e[None, :])
        s = tl.dot(q, tl.trans(k)) * scale
        if CAUSAL:
            s = tl.where(i[:, None] >= j[None, :], s, MASKED)
        if LEFT >= 0:
            s = tl.where(i[:, None] - LEFT <= j[None, :], s, MASKED)
        if RIGHT >= 0:
            s = tl.where(i[:, None] + RIGHT >= j[None, :], s, MASKED)
        if TAIL:
            s = tl.where(j[None, :] < nk, s, MASKED)
        if KeyPadding is not None:
            if TAIL:
                keep = tl.load(KeyPadding + j, mask=j < nk, other=0)
            else:
                keep = tl.load(KeyPadding + j)
            s = tl.where((keep != 0)[None, :], s, MASKED)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp(s - new_top[:, None])
        shrink = tl.math.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)
        top = new_top
    return acc, total, top


@triton.jit
def attention_forward(
    Q,
    K,
    V,
    KeyPadding,
    Out,
    scale,
    batch,
    heads,
    kv_heads,
    nq,
    nk,
    D: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Out [batch, heads, nq, E] from Q [batch, heads, nq, D], K [batch, kv_heads, nk, D], V [batch, kv_heads, nk, E].

    All contiguous, float16 or bfloat16, the softmax in float32. KeyPadding: int8 [batch, nk], 0 = drop; or None. scale:
    float32. D, E: multiples of 16. Query row r stands at key r + nk - nq, with TOP_LEFT at key r; it sees at most LEFT
    keys before that place and RIGHT after it (-1: all), with CAUSAL none after it. TAIL: nq is no multiple of BLOCK_M,
    or nk none of BLOCK_N.
    """
    tiles = (nq + BLOCK_M - 1) // BLOCK_M
    group = heads // kv_heads
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    shift = nk - nq
    if TOP_LEFT:
        shift = 0
    for work in range(tl.program_id(0), tiles * batch * heads, tl.num_programs(0)):
        head = work // tiles
        m = work % tiles * BLOCK_M
        b = head // heads
        kv_head = b * kv_heads + head % heads // group
        rows = m + tl.arange(0, BLOCK_M)
        if TAIL:
            inside = rows[:, None] < nq
            q = tl.load(Q + head.to(tl.int64) * nq * D + rows[:, None] * D + d[None, :], mask=inside, other=0.0)
        else:
            q = tl.load(Q + head.to(tl.int64) * nq * D + rows[:, None] * D + d[None, :])

        # Keys [first, whole) need no mask but a window's left edge, [whole, last) need them all.
        first = 0
        last = nk
        whole = nk
        if TAIL:
            whole = nk // BLOCK_N * BLOCK_N
        if CAUSAL:
            last = tl.minimum(last, m + BLOCK_M + shift)
            whole = tl.minimum(whole, tl.maximum(m + 1 + shift, 0) // BLOCK_N * BLOCK_N)
        if RIGHT >= 0:
            last = tl.minimum(last, m + BLOCK_M + shift + RIGHT)
            whole = tl.minimum(whole, tl.maximum(m + 1 + shift + RIGHT, 0) // BLOCK_N * BLOCK_N)
        if LEFT >= 0:
            first = tl.maximum(m + shift - LEFT, 0) // BLOCK_N * BLOCK_N
            whole = tl.maximum(whole, first)

        acc = tl.zeros([BLOCK_M, E], dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        top = tl.full([BLOCK_M], MASKED, dtype=tl.float32)
        keys = K + kv_head.to(tl.int64) * nk * D
        values = V + kv_head.to(tl.int64) * nk * E
        padding = KeyPadding
        if KeyPadding is not None:
            padding = KeyPadding + b.to(tl.int64) * nk
        acc, total, top = _attend(
            acc, total, top, q, keys, values, padding, first, whole, nk, rows + shift, scale,
            D, E, False, LEFT, -1, False, BLOCK_N,
        )  # fmt: skip
        if (CAUSAL or RIGHT >= 0) or TAIL:
            acc, total, top = _attend(
                acc, total, top, q, keys, values, padding, whole, last, nk, rows + shift, scale,
                D, E, CAUSAL, LEFT, RIGHT, TAIL, BLOCK_N,
            )  # fmt: skip
        if (CAUSAL or LEFT >= 0) or (RIGHT >= 0 or KeyPadding is not None):
            # A row that sees no key has counted the masked ones.
            acc = tl.where((top > SEEN)[:, None], acc, 0.0)
            total = tl.where(top > SEEN, total, 1.0)
        acc = acc / total[:, None]
        place = Out + head.to(tl.int64) * nq * E + rows[:, None] * E + e[None, :]
        if TAIL:
            tl.store(place, acc.to(Out.type.element_ty), mask=inside)
        else:
            tl.store(place, acc.to(Out.type.element_ty))
