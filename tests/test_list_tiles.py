"""The list of tiles: every tile once, heaviest first, nothing else."""

import torch

from tilecut_runtime.list_tiles import list_tiles


def spans_of(others, back=10**6, ahead=0):
    return torch.tensor(others), torch.full((len(others),), back), torch.full((len(others),), ahead)


def test_every_tile_once_and_the_rest_unused():
    lengths = [130, 0, 64, 1, 65]
    listed = list_tiles(torch.tensor(lengths), sum(lengths), 200, 64, spans_of(lengths)).tolist()
    used = [tuple(entry) for entry in listed if entry[0] >= 0]
    assert sorted(used) == [(s, t) for s, n in enumerate(lengths) for t in range(-(-n // 64))]
    assert [entry[0] for entry in listed[len(used) :]] == [-1] * (len(listed) - len(used))
    assert len(listed) == sum(lengths) // 64 + len(lengths)


def test_causal_tiles_come_heaviest_first():
    lengths = [100, 300]
    listed = list_tiles(torch.tensor(lengths), 400, 300, 100, spans_of(lengths))
    assert listed[:4].tolist() == [[1, 2], [1, 1], [0, 0], [1, 0]]


def test_a_window_makes_tiles_alike():
    listed = list_tiles(torch.tensor([400]), 400, 400, 100, spans_of([400], back=50, ahead=50))
    assert listed[:4].tolist() == [[0, 1], [0, 2], [0, 0], [0, 3]]


def test_no_longer_than_the_bound_of_the_longest():
    lengths = [10] * 8
    assert len(list_tiles(torch.tensor(lengths), 80, 10, 64, spans_of(lengths))) == 8


def test_dtype_and_no_sequence_out_of_range():
    listed = list_tiles(torch.tensor([5, 0]), 5, 64, 64, spans_of([5, 0]))
    assert listed.dtype == torch.int32
    assert listed.tolist() == [[0, 0], [-1, listed[1, 1].item()]]
