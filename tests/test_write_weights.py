"""The streaming writer against safetensors' own, byte for byte."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tilecut.write_weights import TYPES, write_weights
from tilecut_runtime.errors import ArtifactError


def some(dtype, *shape):
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


def test_the_bytes_are_safetensors_own(tmp_path):
    tensors = {f"{name}.{letter}": some(dtype, 3, 5) for dtype, name in TYPES.items() for letter in "ba"}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "größe": some(torch.float32, 2)}
    for metadata in ({"format": "pt"}, None):
        save_file(tensors, tmp_path / "theirs", metadata=metadata)
        write_weights(tensors, tmp_path / "ours", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_no_plain_tensor_is_written_as_one(tmp_path):
    """Transposed, a part of a storage, two names of one storage, a parameter with gradients."""
    base = some(torch.float32, 4, 6)
    tensors = {"t": base.T, "part": base[1:3, 2:], "again": base, "same": base, "p": torch.nn.Parameter(base.clone())}
    write_weights(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    got = load_file(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name].detach()) for name in tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("t").get_shape() == [6, 4]


def test_a_type_without_a_name_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="cannot hold x"):
        write_weights({"x": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "x")
    assert not (tmp_path / "x").exists()
