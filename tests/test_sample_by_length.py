"""The batches of `LengthBucketSampler`: every index once, like lengths together, the same in every process."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tilecut import LengthBucketSampler, TilecutError, pad_to_longest

LENGTHS = torch.randint(1, 200, (1000,), generator=torch.Generator().manual_seed(0)).tolist()


def padding(lengths, batches):
    return sum(max(lengths[i] for i in b) * len(b) for b in batches) / sum(lengths)


def test_like_lengths_are_together():
    batches = list(LengthBucketSampler(LENGTHS, batch_size=16))
    assert sorted(itertools.chain(*batches)) == list(range(1000))
    assert {len(b) for b in batches[:-1]} <= {16, 8}
    assert padding(LENGTHS, batches) < 1.05
    assert padding(LENGTHS, [range(i, min(i + 16, 1000)) for i in range(0, 1000, 16)]) > 1.7
    longest = [max(LENGTHS[i] for i in b) for b in batches]
    assert longest != sorted(longest)


def test_epochs_are_deterministic_and_differ():
    one, other = (LengthBucketSampler(LENGTHS, batch_size=16, seed=3) for _ in range(2))
    first = list(one)
    assert first == list(one) == list(other)
    one.set_epoch(1)
    assert list(one) != first
    other.set_epoch(1)
    assert list(other) == list(one)
    one.set_epoch(0)
    assert list(one) == first


def test_without_shuffling_the_order_is_kept_between_windows():
    batches = list(LengthBucketSampler([5, 3, 4, 1, 2, 9], batch_size=2, shuffle=False, window=4))
    assert batches == [[3, 1], [2, 0], [4, 5]]


def test_a_batch_keeps_to_its_tokens():
    padded = list(LengthBucketSampler(LENGTHS, max_tokens=512))
    assert all(max(LENGTHS[i] for i in b) * len(b) <= 512 for b in padded)
    packed = list(LengthBucketSampler(LENGTHS, max_tokens=512, packed=True))
    assert all(sum(LENGTHS[i] for i in b) <= 512 for b in packed)
    assert sorted(itertools.chain(*padded)) == sorted(itertools.chain(*packed)) == list(range(1000))
    assert len(packed) < len(padded)


def test_short_batches_are_left_out_on_request():
    sampler = LengthBucketSampler([1] * 10, batch_size=4, drop_last=True)
    assert len(sampler) == 2 and all(len(b) == 4 for b in sampler)
    shares = [list(LengthBucketSampler([1] * 23, batch_size=4, drop_last=True, rank=r, world_size=2)) for r in range(2)]
    assert [len(s) for s in shares] == [2, 2]


@given(
    st.lists(st.integers(1, 9), min_size=9, max_size=60),
    st.sampled_from([{"batch_size": 2}, {"batch_size": 7}, {"max_tokens": 30}, {"max_tokens": 30, "packed": True}]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([None, 3, 10]),
)
def test_every_index_once_among_all_processes(lengths, size, world, shuffle, window):
    make = lambda rank: LengthBucketSampler(
        lengths, **size, shuffle=shuffle, window=window, rank=rank, world_size=world
    )
    try:
        shares = [make(rank) for rank in range(world)]
    except TilecutError:
        assert world > 1
        return
    assert len({len(s) for s in shares}) == 1
    assert sorted(i for s in shares for batch in s for i in batch) == list(range(len(lengths)))
    assert all(batch for s in shares for batch in s)


def test_in_a_data_loader():
    examples = [{"input_ids": [1] * n} for n in (3, 1, 3, 1)]
    sampler = LengthBucketSampler([len(e["input_ids"]) for e in examples], batch_size=2)
    loader = DataLoader(examples, batch_sampler=sampler, collate_fn=pad_to_longest)  # pyright: ignore
    assert sorted(batch["input_ids"].shape[1] for batch in loader) == [1, 3]
    assert len(loader) == 2


@pytest.mark.parametrize(
    ("lengths", "options", "said"),
    [
        ([], {"batch_size": 1}, "LengthBucketSampler: there are no lengths"),
        ([3, 0], {"batch_size": 1}, "example 1 has no tokens; got 0"),
        ([3, -2], {"batch_size": 1}, "example 1 has no tokens; got -2"),
        ([3, 7], {"max_tokens": 5}, "example 1 is longer than max_tokens; got 7; wanted at most 5"),
        ([3], {}, "give either batch_size or max_tokens; got None and None"),
        ([3], {"batch_size": 1, "max_tokens": 5}, "give either batch_size or max_tokens"),
        ([3], {"batch_size": -1}, "batch_size is not positive; got -1"),
        ([3], {"max_tokens": 0}, "max_tokens is not positive"),
        ([3], {"batch_size": 1, "window": 0}, "window is not positive"),
        ([3], {"batch_size": 1, "rank": 1}, "no such rank; got 1; wanted 0 to 0"),
        (
            [3],
            {"batch_size": 1, "world_size": 2},
            "batches of one example do not divide among the processes; got 1 for 2",
        ),
    ],
)
def test_what_is_refused(lengths, options, said):
    with pytest.raises(TilecutError, match=said):
        LengthBucketSampler(lengths, **options)


@pytest.mark.parametrize("window", [5, 10, 17, None])
def test_only_one_batch_is_dropped_whatever_the_window(window):
    sampler = LengthBucketSampler([1] * 100, 8, window=window, drop_last=True)
    assert len(sampler) == 12 and len({i for batch in sampler for i in batch}) == 96


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": None}, "no list of integers"),
        ({"lengths": [1.5]}, "no list of integers"),
        ({"lengths": "abc"}, "no list of integers"),
        ({"batch_size": "2"}, "batch_size is no integer; got '2'"),
        ({"batch_size": 1.5}, "batch_size is no integer"),
        ({"seed": "1"}, "seed is no integer"),
        ({"rank": 0.5}, "rank is no integer"),
        ({"window": 4.0}, "window is no integer"),
    ],
)
def test_other_types_are_one_error(given, message):
    with pytest.raises(TilecutError, match=message):
        LengthBucketSampler(**{"lengths": [1, 2], "batch_size": 2, **given})
