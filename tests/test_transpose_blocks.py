"""The transposed CSR holds the same pairs of blocks."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from tilecut_runtime.transpose_blocks import BLOCK, first_blocks, transpose_blocks


def test_first_blocks():
    assert first_blocks(torch.tensor([1, 0, 64, 65, 200])).tolist() == [0, 1, 1, 2, 4]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 2**20),
)
def test_transpose_holds_the_same_pairs(lengths, heads, seed):
    make = torch.Generator().manual_seed(seed)
    queries, keys = (torch.tensor(side) for side in zip(*lengths))
    offsets, indices, pairs = [[0] for _ in range(heads)], [], set()
    for h in range(heads):
        offsets[h][0] = len(indices)
        for s, (nq, nk) in enumerate(lengths):
            for m in range(-(-nq // BLOCK)):
                seen = (torch.rand(-(-nk // BLOCK), generator=make) < 0.5).nonzero().flatten().tolist()
                pairs |= {(h, s, m, n) for n in seen}
                indices += seen
                offsets[h].append(len(indices))
    base_q, base_k = first_blocks(queries), first_blocks(keys)
    bound = sum(nk for _, nk in lengths) // BLOCK + len(lengths)
    # Room after the last row is no entry.
    padded = torch.tensor([*indices, 0, 0], dtype=torch.int32)
    starts, local = transpose_blocks(torch.tensor(offsets, dtype=torch.int32), padded, base_q, base_k, bound)
    assert starts.dtype == local.dtype == torch.int32
    found = []
    for h in range(heads):
        for s, (_, nk) in enumerate(lengths):
            for n in range(-(-nk // BLOCK)):
                row = base_k[s].item() + n
                found += [(h, s, m, n) for m in local[starts[h, row] : starts[h, row + 1]].tolist()]
    assert sorted(found) == sorted(pairs)
