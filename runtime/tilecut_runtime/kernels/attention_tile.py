"""What the attention kernels share: a tile's place, its loads by chunks of the width, who sees whom, and the scores.

One family serves dense tensors ([B, H, S, D], any strides but a last one of 1) and packed ones ([T, H, D] with
cumulative lengths). `Tiles`, `CuQ`, `CuK` are None for the dense kind; in a kernel an argument that is None, like a
constexpr that is off, costs nothing.

Widths are never padded to a power of two: a width of 96 is held as chunks of 64 and 32, each a tensor of its own in a
tuple; `CHUNKS` is the tuple of their (start, size), from `split_width`. Only a last 8 is padded, to the 16 that `tl.dot` needs.

Scores are in units of log2(e), for exp2. Ranges are counted in tiles, and split so that tiles which every row sees
whole run without a mask.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# The CSR of visible blocks counts in these, whatever the tile.
SPARSE_BLOCK: tl.constexpr = tl.constexpr(64)
# Arguments whose value is no reason for a binary of its own: what runs at one length runs at all of them.
SIZES = (
    "heads",
    "kv_heads",
    "batch",
    "n_tiles",
    "section",
    "splits",
    "rows",
    "max_q",
    "max_k",
    "lse_batch",
    "lse_head",
    "offsets_head",
    "padding_batch",
)


@triton.jit
def find_tile(Tiles, heads, batch, n_tiles, section, HEAVY_LAST: tl.constexpr):
    """This program's (sequence, head, tile), the heaviest first; a sequence of -1 has nothing to do.

    Packed: the order of the list `Tiles` [n, 2], all heads of an entry one after another. Dense: `section` heads (of
    all batch rows) at a time, so few that their keys and values stay in the L2 cache.
    """
    pid = tl.program_id(0)
    if Tiles is not None:
        entry = pid // heads
        return tl.load(Tiles + 2 * entry), pid % heads, tl.load(Tiles + 2 * entry + 1)
    else:
        first = pid // (section * n_tiles) * section
        width = tl.minimum(section, heads * batch - first)
        place = pid - first * n_tiles
        tile = place // width
        if HEAVY_LAST:
            tile = n_tiles - 1 - tile
        row = first + place % width
        return row // heads, row % heads, tile


@triton.jit
def find_rows(Cu, sequence, rows, batch_stride, row_stride):
    """(offset of the sequence's first row, number of its rows)."""
    if Cu is None:
        return tl.cast(sequence, tl.int64) * batch_stride, rows
    else:
        start = tl.load(Cu + sequence)
        return tl.cast(start, tl.int64) * row_stride, tl.load(Cu + sequence + 1) - start


@triton.jit
def _load_chunk(
    base, offsets, inside, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    columns = START + tl.arange(0, SIZE)
    pointers = base + (offsets[:, None] + columns[None, :])
    if START + SIZE > WIDTH:
        if CHECK:
            return tl.load(pointers, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        if CHECK:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def load_chunks(base, offsets, inside, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr):
    """The rows at `base + offsets` as a tuple of [rows, chunk]; zeros beyond the width and, with CHECK, outside."""
    chunks = ()
    for c in tl.static_range(len(CHUNKS)):
        chunks = chunks + (_load_chunk(base, offsets, inside, CHUNKS[c][0], CHUNKS[c][1], WIDTH, CHECK),)
    return chunks


@triton.jit
def _store_chunk(base, offsets, inside, x, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    columns = START + tl.arange(0, SIZE)
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + (offsets[:, None] + columns[None, :]), x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_chunks(base, offsets, inside, chunks, factor, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Write factor * chunks, in the type of `base`."""
    for c in tl.static_range(len(CHUNKS)):
        _store_chunk(base, offsets, inside, chunks[c] * factor, CHUNKS[c][0], CHUNKS[c][1], WIDTH)


@triton.jit
def _zero_chunk(ROWS: tl.constexpr, SIZE: tl.constexpr):
    return tl.zeros([ROWS, SIZE], tl.float32)


@triton.jit
def zero_chunks(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Accumulators: a tuple of float32 [ROWS, chunk]."""
    chunks = ()
    for c in tl.static_range(len(CHUNKS)):
        chunks = chunks + (_zero_chunk(ROWS, CHUNKS[c][1]),)
    return chunks


@triton.jit
def dot_chunks(a, b, PRECISION: tl.constexpr):
    """a b^T, summed over the chunks: [rows of a, rows of b]."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for c in tl.static_range(1, len(a)):
        product = tl.dot(a[c], tl.trans(b[c]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(chunks, weights, x, PRECISION: tl.constexpr):
    """chunks + weights x, chunk by chunk."""
    result = ()
    for c in tl.static_range(len(x)):
        result = result + (tl.dot(weights.to(x[c].dtype), x[c], chunks[c], input_precision=PRECISION),)
    return result


@triton.jit
def scale_rows(chunks, factor):
    """Each row of each chunk times its own factor."""
    result = ()
    for c in tl.static_range(len(chunks)):
        result = result + (chunks[c] * factor[:, None],)
    return result


@triton.jit
def split_range(first, last, whole_first, whole_last, global_last, count, BLOCK: tl.constexpr):
    """Tiles of a range by how they must be treated.

    Positions [first, last) are seen by someone, [whole_first, whole_last) by all, [0, global_last) by all or none;
    there are `count` positions. Returns (g, a, b, c, d): tiles [0, g), [a, b) and [c, d) need a mask, [b, c) none.
    """
    end = tl.cdiv(tl.maximum(count, 0), BLOCK)
    a = tl.minimum(tl.maximum(first, 0) // BLOCK, end)
    d = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(last, 0), BLOCK), end), a)
    b = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(whole_first, 0), BLOCK), a), d)
    c = tl.maximum(tl.minimum(tl.maximum(tl.minimum(whole_last, count), 0) // BLOCK, d), b)
    g = tl.minimum(tl.cdiv(tl.maximum(global_last, 0), BLOCK), a)
    return g, a, b, c, d


@triton.jit
def masked_tile(step, g, a, b, c):
    """The tile of the step-th pass over [0, g), [a, b), [c, d)."""
    tile = step + tl.where(step >= g, a - g, 0)
    return tile + tl.where(step >= g + b - a, c - b, 0)


@triton.jit
def key_range(
    m,
    rows,
    nk,
    shift,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    GLOBAL: tl.constexpr,
):
    """`split_range` of the keys that the queries [m, m + rows) see."""
    low = m + shift
    high = low + rows - 1
    first = 0
    last = nk
    whole_first = 0
    whole_last = nk
    global_last = 0
    if LEFT >= 0:
        first = low - LEFT
        whole_first = high - LEFT
    if RIGHT >= 0:
        last = high + RIGHT + 1
        whole_last = low + RIGHT + 1
    if GLOBAL > 0:
        global_last = GLOBAL
        # The first positions see everything.
        first = tl.where(low < GLOBAL, 0, first)
        last = tl.where(low < GLOBAL, nk, last)
    if CAUSAL:
        last = tl.minimum(last, high + 1)
        whole_last = tl.minimum(whole_last, low + 1)
    return split_range(first, last, whole_first, whole_last, global_last, nk, BLOCK)


@triton.jit
def query_range(
    n,
    columns,
    nq,
    shift,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    GLOBAL: tl.constexpr,
):
    """`split_range` of the queries that see the keys [n, n + columns)."""
    low = n - shift
    high = low + columns - 1
    first = 0
    last = nq
    whole_first = 0
    whole_last = nq
    global_last = 0
    if LEFT >= 0:
        last = high + LEFT + 1
        whole_last = low + LEFT + 1
    if RIGHT >= 0:
        first = low - RIGHT
        whole_first = high - RIGHT
    if GLOBAL > 0:
        global_last = GLOBAL - shift
        first = tl.where(n < GLOBAL, 0, first)
        last = tl.where(n < GLOBAL, nq, last)
    if CAUSAL:
        first = tl.maximum(first, low)
        whole_first = tl.maximum(whole_first, high)
    return split_range(first, last, whole_first, whole_last, global_last, nq, BLOCK)


@triton.jit
def visible(
    i,
    j,
    nq,
    nk,
    shift,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    GLOBAL: tl.constexpr,
):
    """Whether query i sees key j by position; i and j broadcast against each other."""
    ahead = j - i - shift
    keep = (i < nq) & (j < nk)
    if LEFT >= 0 or RIGHT >= 0:
        near = ahead == ahead
        if LEFT >= 0:
            near = near & (ahead >= -LEFT)
        if RIGHT >= 0:
            near = near & (ahead <= RIGHT)
        if GLOBAL > 0:
            near = near | (j < GLOBAL) | (i + shift < GLOBAL)
        keep = keep & near
    if CAUSAL:
        keep = keep & (ahead <= 0)
    return keep


@triton.jit
def load_bias(Bias, m, n, rows, columns, nq, nk, bias_row, bias_column):
    """The tile of the bias at rows m + rows and columns n + columns, which broadcast."""
    place = Bias + tl.cast(m, tl.int64) * bias_row + tl.cast(n, tl.int64) * bias_column
    readable = (m + rows < nq) & (n + columns < nk)
    return tl.load(place + (rows * bias_row + columns * bias_column), readable, 0.0).to(tl.float32)


@triton.jit
def adjust_scores(s, i, j, shift, bias, slope, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores times log2(e) from q k^T, and the derivative of the soft-cap (1.0 without one)."""
    slack = 1.0
    if SOFTCAP > 0.0:
        # tanh by exp2, whose limits at +-inf are right
        capped = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * SCALE * LOG2E / SOFTCAP)))
        slack = 1.0 - capped * capped
        s = capped * (SOFTCAP * LOG2E)
    else:
        s = s * (SCALE * LOG2E)
    if bias is not None:
        s += bias * LOG2E
    if slope is not None:
        s -= (slope * LOG2E) * tl.abs(j - i - shift).to(tl.float32)
    return s, slack


@triton.jit
def dropout_factor(seed, i, j, max_k, DROPOUT: tl.constexpr):
    """1 / (1 - p) where the pair (i, j) is kept, else 0: Philox of the seed and the pair's number."""
    kept = tl.rand(seed, i * max_k + j) > DROPOUT
    return tl.where(kept, 1.0 / (1.0 - DROPOUT), 0.0)
