"""What the command line reads and writes: whatever is no .npz is one error, outputs go to the very path named."""

from types import SimpleNamespace

import numpy as np
import pytest

from tilecut.cli_inputs import made_up_inputs, numbers, read_inputs, write_outputs
from tilecut_runtime.errors import ArtifactError, InputError
from tilecut_runtime.manifest import DimRange, TensorSpec

X = {"x": np.arange(12.0).reshape(3, 4)}


def session(path=None):
    """As much of a session as reading inputs looks at."""
    specs = (TensorSpec("x", "float32", ("batch", "sequence")), TensorSpec("mask", "int64", ("batch", 3)))
    dims = {"batch": DimRange(), "sequence": DimRange(1, 8)}
    return SimpleNamespace(path=path, inputs=specs, manifest=SimpleNamespace(generation=None, dims=dims, inputs=specs))


@pytest.mark.parametrize("name", ["out.npz", "out", "out.bin"])
def test_outputs_are_written_to_the_very_path_and_read_back(name, tmp_path):
    write_outputs(tmp_path / name, X)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert np.array_equal(read_inputs(session(), tmp_path / name, None)["x"], X["x"])


@pytest.mark.parametrize("name", ["absent/out.npz", ".", "a\0b"])
def test_outputs_that_cannot_be_written(name, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_outputs(tmp_path / name, X)


def checksum(path):
    np.savez(path, **X)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: np.save(path.open("wb"), X["x"]),
        lambda path: path.write_bytes(b"junk"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04junk"),
        lambda path: np.savez(path, x=np.array([{}])),
        lambda path: path.mkdir(),
        lambda path: None,
        checksum,
    ],
    ids=["npy", "junk", "empty", "zip junk", "pickle", "folder", "absent", "checksum"],
)
def test_what_is_no_npz_is_one_error(make, tmp_path):
    make(tmp_path / "i.npz")
    with pytest.raises(InputError, match=r"i\.npz: cannot be read as \.npz") as caught:
        read_inputs(session(), tmp_path / "i.npz", None)
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_one_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: tokenizers cannot read it"):
        read_inputs(session(tmp_path), None, ["a text"])


def test_made_up_inputs_and_sizes_that_do_not_fit():
    made = made_up_inputs(session().manifest, 2, 5)
    assert {k: (v.shape, v.dtype.name) for k, v in made.items()} == {
        "x": ((2, 5), "float32"),
        "mask": ((2, 3), "int64"),
    }
    with pytest.raises(InputError, match="--sequence: the model does not allow that size; got 9"):
        made_up_inputs(session().manifest, 2, 9)
    with pytest.raises(InputError, match="--threads: too large; got 9; wanted 1 to 8"):
        numbers("--threads", "1,9", 8)
    with pytest.raises(InputError, match="input x: too large for this machine"):
        made_up_inputs(session().manifest, 2**62, 5)


def test_numbers():
    assert numbers("--batch", "1,8") == [1, 8]
    for text in ("", "one", "1,,2", "0", "1,-1"):
        with pytest.raises(InputError, match="--batch"):
            numbers("--batch", text)
