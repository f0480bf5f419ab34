"""Tensors in files: equal values, shared storage, nothing left behind."""

import errno
import os

import pytest
import torch

from tilecut_passes.disk_tensor import LEAST_BYTES, DiskTensors, WaitingTensors, is_file, is_mapped
from tilecut_runtime.errors import ConfigError

LARGE = LEAST_BYTES // 4


def test_values_shapes_and_strides_are_kept(tmp_path):
    base = torch.randn(6, 8)
    given = [base, base.T, base[1:3, 2:], torch.arange(5), torch.randn(3) > 0, torch.tensor(2.5), torch.empty(0, 3)]
    got = DiskTensors(tmp_path).put(given)
    for one, other in zip(given, got, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
        assert is_mapped(other) and not is_mapped(one)
    got[0].fill_(7)
    assert (got[1] == 7).all() and (got[2] == 7).all(), "views of one storage are views of one mapping"
    assert (base != 7).any()


def test_no_file_has_a_name(tmp_path):
    held = DiskTensors(tmp_path / "made" / "here").put([torch.ones(1000)])
    assert os.listdir(tmp_path / "made" / "here") == []
    assert float(held[0].sum()) == 1000


def test_only_what_is_large_and_in_memory_moves(tmp_path):
    disk = DiskTensors(tmp_path)
    small, large = torch.ones(10), torch.randn(LARGE)
    assert disk(small) is small
    moved = disk(large)
    assert is_mapped(moved) and torch.equal(moved, large) and disk(moved) is moved
    part = torch.randn(4, LARGE)[1]
    assert disk(part).untyped_storage().nbytes() == part.numel() * 4, "a row does not bring the others along"


def test_a_file_that_others_mapped_is_seen(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(torch.ones(LARGE).numpy().tobytes())
    theirs = torch.from_file(str(path), size=LARGE)
    assert is_file(theirs) and not is_file(torch.ones(LARGE))
    assert is_file(DiskTensors(tmp_path)(torch.ones(LARGE)))


def test_waiting_tensors_go_to_disk_beyond_the_limit(tmp_path):
    waiting = WaitingTensors(DiskTensors(tmp_path), limit=10_000)
    first, second = torch.randn(2000), torch.randn(2000)
    assert waiting.put("first", [first, first.view(2, -1)])[0] is first, "a storage counts once"
    (moved,) = waiting.put("second", [second])
    assert is_mapped(moved) and torch.equal(moved, second)
    assert waiting.put("second", [moved])[0] is moved, "what is on disk stays there"
    waiting.put("first", [])
    assert waiting.put("second", [moved, first])[1] is first, "what has gone makes room"


def test_without_a_folder_a_temporary_one_is_used_when_it_is_needed():
    waiting = WaitingTensors(limit=0)
    (moved,) = waiting.put("owner", [torch.ones(100)])
    assert is_mapped(moved) and waiting.disk is not None


def test_a_folder_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"offload: the folder cannot be made"):
        DiskTensors(tmp_path / "file" / "folder")

    def full(handle, mode):
        os.close(handle)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(ConfigError, match=r"offload: a tensor cannot be written \(No space left"):
        DiskTensors(tmp_path)(torch.ones(LARGE))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
