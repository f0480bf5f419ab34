"""Reference cases: what it means to agree, and what travels in ref/."""

import math
import shutil

import numpy as np
import pytest
import torch

from checks import TinyMlp, emit, mlp_graph, randomise
from tilecut_passes.capture import capture
from tilecut_runtime import reference
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import Manifest, TensorSpec, list_files
from tilecut_runtime.reference import SMALL, Case, read_cases, verify_on_device, write_cases
from tilecut_targets.edge.target import EdgeTarget


def case(want, valid=None):
    want = np.asarray(want)
    mask = np.ones(want.shape[:1], bool) if valid is None else np.asarray(valid)
    return Case({"x": np.zeros((2, 13), np.float32)}, {"y": want}, {"y": mask})


def test_the_error_is_the_largest_difference_relative_to_the_largest_magnitude():
    assert case([100.0, -200.0]).error({"y": np.array([101.0, -200.0])}) == pytest.approx(0.005)


def test_outputs_of_next_to_nothing_are_compared_absolutely():
    assert case([0.01, 0.02]).error({"y": np.array([0.01, 0.03])}) == pytest.approx(0.5)
    assert case([1e-9, 2e-9]).error({"y": np.array([1e-9, 3e-9])}) == pytest.approx(1e-9 / SMALL)


LEAST = float(np.finfo(np.float32).min)


def test_a_number_that_stands_for_infinity_hides_no_other_error():
    assert case([LEAST, 1.0, 2.0]).error({"y": np.array([LEAST, 1.0, 2.5])}) == pytest.approx(0.25)
    assert case([LEAST, 2.0]).error({"y": np.array([LEAST * 0.9, 2.0])}) == pytest.approx(0.1)
    assert case([LEAST, LEAST]).error({"y": np.array([LEAST, 3.0])}) == pytest.approx(1.0)
    assert case([-math.inf, 2.0]).error({"y": np.array([-math.inf, 2.0])}) == 0
    assert case([-math.inf, 2.0]).error({"y": np.array([3.0, 2.0])}) == math.inf


def test_equal_outputs_have_no_error_and_empty_ones_neither():
    assert case([1.0, 2.0]).error({"y": np.array([1.0, 2.0])}) == 0
    assert case(np.zeros((0, 3))).error({"y": np.zeros((0, 3))}) == 0


def test_padded_rows_do_not_count_even_where_they_are_nan():
    one = case([[1.0, 2.0], [3.0, 4.0]], [[True, False], [True, True]])
    assert one.error({"y": np.array([[1.0, np.nan], [3.0, 4.0]])}) == 0
    assert one.error({"y": np.array([[1.0, 2.0], [3.0, 5.0]])}) == pytest.approx(0.25)


@pytest.mark.parametrize("wrong", [[1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]], [1.0, 2.0, 3.0]])
def test_nan_infinity_and_another_shape_are_infinitely_wrong(wrong):
    assert case([1.0, 2.0]).error({"y": np.array(wrong)}) == math.inf


def test_a_reference_that_is_nan_is_never_met():
    assert case([1.0, math.nan]).error({"y": np.array([1.0, math.nan])}) == math.inf


def test_the_worst_output_decides():
    one = Case({}, {"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2, bool), "b": np.ones(2, bool)})
    assert one.error({"a": np.array([1.0, 1.1]), "b": np.array([1.5, 1.0])}) == pytest.approx(0.5)
    assert one.error({"a": np.array([1.5, 1.0]), "b": np.array([1.0, 1.1])}) == pytest.approx(0.5)


def test_of_integers_and_booleans_the_share_that_differs_counts():
    """An id that is a near tie may flip in 16 bits; how far the two ids are apart says nothing."""
    assert case(np.array([True, False])).error({"y": np.array([True, True])}) == 0.5
    assert case(np.array([7, 50_000])).error({"y": np.array([7, 3])}) == 0.5
    assert case(np.array([2**60, 1])).error({"y": np.array([2**60, 1])}) == 0


def test_the_size_is_the_first_inputs_shape():
    assert case([1.0]).size == "2x13"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return emit(EdgeTarget(), mlp_graph(), tmp_path_factory.mktemp("edge") / "artifact")


@pytest.fixture
def folder(artifact, tmp_path):
    return shutil.copytree(artifact.folder, tmp_path / "copy")


def relist(folder):
    """Make the manifest fit changed files, as one who means harm would."""
    manifest = Manifest.read(folder)
    manifest.files = list_files(folder)
    manifest.write(folder)
    return manifest


def test_cases_are_read_back_as_they_were_written(artifact):
    read = read_cases(artifact.folder, artifact.manifest)
    assert len(read) == len(artifact.cases) > 1
    for a, b in zip(artifact.cases, read):
        for part in ("inputs", "outputs", "valid"):
            want, got = getattr(a, part), getattr(b, part)
            assert list(want) == list(got)
            for name in want:
                assert want[name].dtype == got[name].dtype
                assert np.array_equal(want[name], got[name])


def test_names_with_colons_and_many_cases_keep_their_parts(tmp_path):
    rows = {"model.layers:0": np.arange(3.0)}
    write_cases([Case(rows, rows, {"model.layers:0": np.ones(3, bool)})] * 11, tmp_path)
    specs = (TensorSpec("model.layers:0", "float64", (3,)),)
    manifest = Manifest("edge", "onnxruntime", "M", {}, specs, specs, files=list_files(tmp_path))
    read = read_cases(tmp_path, manifest)
    assert len(read) == 11
    assert all(list(c.inputs) == ["model.layers:0"] == list(c.valid) for c in read)


def test_an_artifact_without_references_says_so(folder):
    shutil.rmtree(folder / "ref")
    with pytest.raises(ArtifactError, match="no reference inputs in ref/"):
        read_cases(folder, relist(folder))


def test_a_missing_or_altered_case_is_found(folder):
    manifest = Manifest.read(folder)
    path = folder / "ref" / "case_1.npz"
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    with pytest.raises(ArtifactError, match=r"case_1\.npz: file was altered"):
        read_cases(folder, manifest)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"case_1\.npz: file of the artifact is missing"):
        read_cases(folder, manifest)


def test_a_case_with_a_pickle_in_it_is_not_loaded(folder):
    np.savez(folder / "ref" / "case_0.npz", **{"inputs:x": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(ArtifactError, match="allow_pickle=False"):
        read_cases(folder, relist(folder))


def test_a_whole_artifact_verifies_on_its_device(artifact):
    hashes, equal = verify_on_device(artifact.folder)
    assert (hashes.name, hashes.status) == ("hashes", "passed")
    assert f"{len(artifact.manifest.files)} files" in hashes.detail
    assert (equal.name, equal.status, equal.limit) == ("artifact equals reference", "passed", EdgeTarget.tolerance)
    assert equal.figure is not None and equal.figure < 1e-5
    assert "onnxruntime on cpu" in equal.detail and "1x12" in equal.detail


def test_another_models_outputs_fail_the_rung(artifact, folder):
    other = capture(randomise(TinyMlp(), seed=1), torch.randn(4, 12))
    shutil.rmtree(folder / "ref")
    cases = [
        Case(c.inputs, {k: v.numpy() for k, v in other.run({"x": torch.from_numpy(c.inputs["x"])}).items()}, c.valid)
        for c in artifact.cases
    ]
    write_cases(cases, folder)
    relist(folder)
    _, equal = verify_on_device(folder)
    assert equal.status == "failed"
    assert equal.figure is not None and equal.figure > 0.01


def test_the_limit_is_the_one_in_the_manifest(folder):
    manifest = Manifest.read(folder)
    manifest.tolerance = 0.25
    manifest.write(folder)
    assert verify_on_device(folder)[1].limit == 0.25


def test_an_altered_file_stops_verification(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="another size"):
        verify_on_device(folder)


def stored(**arrays):
    def write(path):
        np.savez(path, **arrays)

    return write


def flipped(path):
    """One bit of an array's numbers changed: the zip's checksum says so."""
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)


X, Y = {"inputs:x": np.ones((1, 12), np.float32)}, {"outputs:output": np.ones((1, 3), np.float32)}


@pytest.mark.parametrize(
    "forge",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"junk"),
        lambda path: np.save(path.open("wb"), np.ones(3)),
        flipped,
        stored(rows=np.ones(3)),
        stored(**X, **Y),
        stored(**X, **Y, **{"valid:output": np.ones(1)}),
        stored(**X, **Y, **{"valid:output": np.ones(2, bool)}),
        stored(**X, **{"outputs:other": np.ones(1), "valid:other": np.ones(1, bool)}),
    ],
    ids=["truncated", "empty", "junk", "npy", "checksum", "parts", "no rows", "numbers", "other rows", "other names"],
)
def test_a_forged_case_whose_hash_fits_is_one_error(forge, folder):
    forge(folder / "ref" / "case_0.npz")
    with pytest.raises(ArtifactError, match=r"case_0\.npz: not a reference case") as caught:
        read_cases(folder, relist(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numbers", [1, 3, 7, 1 << 22])
def test_the_error_does_not_depend_on_how_many_numbers_are_compared_at_a_time(numbers, monkeypatch):
    monkeypatch.setattr(reference, "NUMBERS", numbers)
    generator = np.random.default_rng(0)
    want = generator.normal(size=(4, 5, 6)).astype(np.float32)
    got = want + generator.normal(size=want.shape).astype(np.float32) * 1e-3
    plain = float(np.abs(want.astype(np.float64) - got).max() / np.abs(want).max())
    assert case(want).error({"y": got}) == pytest.approx(plain)
    # The scale is that of all numbers, and a NaN anywhere shows.
    got[3, 4, 5] = np.nan
    assert case(want).error({"y": got}) == math.inf
    want[3, 4, 5] = np.nan
    assert case(want).error({"y": got}) == math.inf
    banned = np.full_like(want, np.finfo(np.float32).min)
    assert case(banned).error({"y": banned.copy()}) == 0
