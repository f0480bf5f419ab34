"""`tilecut::cached_attention`: equal to attention over the whole text, however it is cut into steps; refusals; its fake."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilecut_runtime.attention import attention
from tilecut_runtime.cached_attention import cached_attention
from tilecut_runtime.errors import InputError


def heads(batch, count, length, width):
    return torch.randn(batch, count, length, width, dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(
    first=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    steps=st.lists(st.integers(1, 3), max_size=4),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 3),
    window=st.sampled_from([-1, 0, 2, 5]),
    softcap=st.sampled_from([0.0, 1.5]),
    distances=st.sampled_from([0, 1, 4, 40]),
)
def test_steps_equal_the_whole(first, steps, groups, repeats, window, softcap, distances):
    torch.manual_seed(len(first))
    batch, spare = len(first), 2
    total = max(first) + sum(steps)
    capacity = total + spare
    q, k, v = heads(batch, groups * repeats, total, 4), heads(batch, groups, total, 4), heads(batch, groups, total, 6)
    table = torch.randn(groups * repeats, distances, dtype=torch.float64) if distances else None
    behind = torch.arange(total)[:, None] - torch.arange(total)
    bias = None if table is None else table[:, behind.clamp(0, distances - 1)][None]
    want = attention(q, k, v, bias=bias, scale=0.4, causal="top_left", window=(window, -1), softcap=softcap)
    # NaN where nothing was written yet: it must not be read.
    cache = [torch.full((batch, groups, capacity, width), float("nan"), dtype=torch.float64) for width in (4, 6)]
    done = torch.zeros(batch, dtype=torch.int64)
    for i, size in enumerate([max(first), *steps]):
        new = torch.tensor(first) if i == 0 else torch.full((batch,), size)
        size = int(new.max())
        at = (done[:, None] + torch.arange(size)).clamp(max=total - 1)[:, None, :, None]
        given_ = [x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3])) for x in (q, k, v)]
        out, *cache = cached_attention(*given_, *cache, done, new, table, scale=0.4, window=window, softcap=softcap)
        for b in range(batch):
            n, p = int(new[b]), int(done[b])
            torch.testing.assert_close(out[b, :, :n], want[b, :, p : p + n])
            torch.testing.assert_close(cache[0][b, :, : p + n], k[b, :, : p + n])
        done = done + new


def test_its_fake_and_schema_hold():
    q, k, v = heads(2, 4, 3, 4), heads(2, 2, 3, 4), heads(2, 2, 3, 6)
    cache = heads(2, 2, 8, 4), heads(2, 2, 8, 6)
    counts = torch.tensor([1, 0]), torch.tensor([3, 2])
    torch.library.opcheck(
        torch.ops.tilecut.cached_attention.default,
        (q, k, v, *cache, *counts, torch.randn(4, 5, dtype=torch.float64)),
        {"scale": 0.5, "window": 2, "softcap": 0.0},
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": heads(2, 3, 3, 4)}, "q, k and v do not fit"),
        ({"past_key": heads(2, 2, 8, 5)}, "past_key does not fit"),
        ({"past_value": heads(1, 2, 8, 4)}, "past_value does not fit"),
        ({"lengths": torch.tensor([1])}, "lengths does not fit"),
        ({"distance_bias": torch.randn(2, 5)}, r"distance_bias does not fit; got \[2, 5\]; wanted \[4, distances\]"),
        ({"distance_bias": torch.randn(4, 0)}, "distance_bias does not fit"),
        ({"past_lengths": torch.tensor([6, 0])}, "more tokens than the cache has places; got 9; wanted at most 8"),
    ],
)
def test_refusals(change, why):
    held = {
        "q": heads(2, 4, 3, 4),
        "k": heads(2, 2, 3, 4),
        "v": heads(2, 2, 3, 4),
        "past_key": heads(2, 2, 8, 4),
        "past_value": heads(2, 2, 8, 4),
        "past_lengths": torch.tensor([1, 0]),
        "lengths": torch.tensor([3, 3]),
    }
    with pytest.raises(InputError, match=why):
        cached_attention(**{**held, **change}, scale=0.5)
