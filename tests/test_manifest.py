"""The manifest: what is written is read back, what is malformed gives one ArtifactError, what is altered is found."""

import copy
import dataclasses
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilecut_runtime.cache_layout import CacheLayout
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import (
    DTYPES,
    FORMAT,
    MANIFEST,
    DimRange,
    FileEntry,
    Manifest,
    Rung,
    Signature,
    TensorSpec,
    list_files,
    sha256,
)

MODEL = Manifest(
    target="edge",
    runtime="onnxruntime",
    model="BertModel",
    entry={"model": "model.onnx"},
    inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")), TensorSpec("x", "float32", ("batch", 3))),
    outputs=(TensorSpec("hidden", "float32", ("batch", "sequence", 32)),),
    dims={"batch": DimRange(), "sequence": DimRange(1, 512)},
    returns="tuple",
    table_rows={"input_ids": 99},
    tolerance=2e-3,
    tools={"torch": "2.13.0"},
    created="2026-01-01T00:00:00+00:00",
    verification=(Rung("hashes", "passed"), Rung("NPU", "not run", "needs one", 0.5, 1.0)),
    files={"model.onnx": FileEntry(5, "0" * 64), "ref/case_0.npz": FileEntry(7, "1" * 64)},
)


# Artifacts of before a field was there have none.
OPTIONAL = ("format", "quantize", "generation", "module", "encoder", "table_rows")


def saved(folder, held):
    (folder / MANIFEST).write_text(held if isinstance(held, str) else json.dumps(held), encoding="utf-8")
    return folder


@pytest.fixture
def held(tmp_path):
    MODEL.write(tmp_path)
    return json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))


def test_what_is_written_is_read_back(tmp_path):
    MODEL.write(tmp_path)
    assert Manifest.read(tmp_path) == MODEL
    assert Manifest.read(str(tmp_path)) == MODEL


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\\"), min_size=1, max_size=8)
files = names.filter(lambda name: not name.startswith("/") and ".." not in name.split("/"))
SIZES = ("batch", "sequence", "Länge")
specs = st.builds(
    TensorSpec,
    names,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 99) | st.sampled_from([*SIZES, "2*batch", "sequence + 1"]), max_size=3).map(tuple),
)
ranges = st.builds(DimRange, st.integers(0, 9), st.none() | st.integers(9, 99))
manifests = st.builds(
    Manifest,
    target=names,
    runtime=names,
    model=names,
    entry=st.dictionaries(names, files, max_size=2),
    inputs=st.lists(specs, max_size=2).map(tuple),
    outputs=st.lists(specs, min_size=1, max_size=2).map(tuple),
    # A dynamic size in a shape is one of dims, or an expression.
    dims=st.fixed_dictionaries(dict.fromkeys(SIZES, ranges)),
    tolerance=st.floats(0, 1),
    tools=st.dictionaries(names, names, max_size=2),
    verification=st.lists(
        st.builds(Rung, names, st.sampled_from(["passed", "failed", "not run"]), names, st.none() | st.floats(0, 1)),
        max_size=2,
    ).map(tuple),
    files=st.dictionaries(files, st.builds(FileEntry, st.integers(0, 1 << 40), names), max_size=2),
)


@given(manifest=manifests)
def test_any_manifest_is_read_back(tmp_path_factory, manifest):
    folder = tmp_path_factory.getbasetemp()
    manifest.write(folder)
    assert Manifest.read(folder) == manifest


def test_a_spec_reads_like_a_signature():
    assert str(TensorSpec("x", "int64", ("batch", 3))) == "x: int64 [batch, 3]"


def test_a_folder_that_is_no_artifact_is_said_to_be_none(tmp_path):
    with pytest.raises(ArtifactError, match="no such artifact folder"):
        Manifest.read(tmp_path / "missing")
    with pytest.raises(ArtifactError, match=f"holds no {MANIFEST}"):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ArtifactError, match=f"holds no {MANIFEST}"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "no json", "[" * 100_000, '{"format": ' + "1" * 5000 + "}"])
def test_what_is_no_json_is_said_to_be_none(tmp_path, text):
    with pytest.raises(ArtifactError, match="not valid JSON"):
        Manifest.read(saved(tmp_path, text))


def test_bytes_that_are_no_text_are_no_json(tmp_path):
    (tmp_path / MANIFEST).write_bytes(b'\xff\xfe{"format": 1}')
    with pytest.raises(ArtifactError, match="not valid JSON"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        [],
        '"text"',
        3,
        None,
        {},
        {"format": FORMAT + 1},
        {"format": "1"},
        {"format": None},
        {"format": True},
        {"format": 1.0},
    ],
)
def test_another_format_is_refused_before_it_is_read(tmp_path, other):
    with pytest.raises(ArtifactError, match=rf"unknown artifact format.*wanted {FORMAT}"):
        Manifest.read(saved(tmp_path, other))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Manifest) if f.name not in OPTIONAL])
def test_a_missing_field_is_named(tmp_path, held, name):
    del held[name]
    with pytest.raises(ArtifactError, match=f"malformed manifest.*{name}"):
        Manifest.read(saved(tmp_path, held))


def test_an_artifact_without_a_word_is_not_quantized(tmp_path, held):
    del held["quantize"]
    assert Manifest.read(saved(tmp_path, held)) == MODEL
    held["quantize"] = "int8"
    assert Manifest.read(saved(tmp_path, held)).quantize == "int8"
    held["quantize"] = 8
    with pytest.raises(ArtifactError, match="malformed manifest.*8 is no string"):
        Manifest.read(saved(tmp_path, held))


def generating():
    """A manifest of a model with one cache."""
    cache = [TensorSpec(f"{name}.0.key", "float32", ("batch", 2, "capacity", 8)) for name in ("past_key_values", "present")]
    counts = [TensorSpec(name, "int64", ("batch",)) for name in ("past_lengths", "lengths")]
    layout = CacheLayout("input_ids", "logits", {"past_key_values.0.key": "present.0.key"}, 64, (2,))
    return dataclasses.replace(
        MODEL,
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")), *counts, cache[0]),
        outputs=(TensorSpec("logits", "float32", ("batch", 1, 9)), cache[1]),
        dims={**MODEL.dims, "capacity": DimRange(1, 64)},
        generation=layout,
        module=Signature(MODEL.inputs, MODEL.outputs, MODEL.dims, "tuple"),
    )


def test_a_cache_is_read_back(tmp_path):
    made = generating()
    made.write(tmp_path)
    assert Manifest.read(tmp_path) == made
    assert made.of_module.inputs == MODEL.inputs and MODEL.of_module is MODEL


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tokens": "ids"}, "generation names 'ids', which the model does not have"),
        ({"states": {"past_key_values.0.key": "present.7.key"}}, "generation names 'present.7.key'"),
        ({"max_length": 0}, "generation has max_length 0"),
        ({"eos": [-1]}, r"eos \(-1,\) and start \(\)"),
        ({"states": {}}, "generation's states lack 'past_key_values.0.key'"),
        ({"logits": "present.0.key"}, "generation takes 'present.0.key' for logits, which continues a cache"),
        ({"states": 3}, "malformed"),
        ({"eos": None}, "malformed"),
    ],
)
def test_a_damaged_cache_is_named(tmp_path, change, why):
    generating().write(tmp_path)
    held = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    held["generation"] |= change
    with pytest.raises(ArtifactError, match=why):
        Manifest.read(saved(tmp_path, held))


def put(held, path, value):
    *steps, last = path
    for step in steps:
        held = held[step]
    held[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["target"], None),
        (["runtime"], ["onnxruntime"]),
        (["model"], 3),
        (["entry"], "model.onnx"),
        (["entry", "model"], 3),
        (["inputs"], None),
        (["inputs"], {"input_ids": "int64"}),
        (["inputs", 0], "input_ids"),
        (["inputs", 0, "name"], 3),
        (["inputs", 0, "dtype"], "float31"),
        (["inputs", 0, "dtype"], None),
        (["inputs", 0, "shape"], "batch"),
        (["inputs", 0, "shape"], 2),
        (["inputs", 0, "shape", 0], 1.5),
        (["inputs", 0, "shape", 0], -1),
        (["inputs", 0, "shape", 0], True),
        (["inputs", 0, "shape", 0], None),
        (["outputs", 0], {}),
        (["dims"], []),
        (["dims", "batch"], 3),
        (["dims", "batch", "min"], "1"),
        (["dims", "batch", "max"], float("inf")),
        (["returns"], 3),
        (["table_rows"], [9]),
        (["table_rows", "input_ids"], -1),
        (["table_rows", "input_ids"], 9.5),
        (["table_rows"], {"z": 9}),
        (["tolerance"], "1e-3"),
        (["tolerance"], float("nan")),
        (["tolerance"], float("inf")),
        (["tolerance"], 10**400),
        (["tolerance"], True),
        (["tolerance"], -1e-3),
        (["tolerance"], None),
        (["dims", "sequence", "min"], 513),
        (["dims"], {"batch": {"min": 1, "max": None}}),
        (["inputs", 0, "shape", 1], "length"),
        (["outputs", 0, "shape", 1], "length"),
        (["outputs"], []),
        (["tools"], None),
        (["tools", "torch"], 2),
        (["verification"], 3),
        (["verification", 0], {"name": "hashes"}),
        (["verification", 0, "status"], "maybe"),
        (["verification", 0, "colour"], "red"),
        (["verification", 0, "detail"], None),
        (["verification", 0, "figure"], "small"),
        (["files"], ["model.onnx"]),
        (["files", "model.onnx"], 5),
        (["files", "model.onnx", "bytes"], "5"),
        (["files", "model.onnx", "bytes"], 1e999),
        (["files", "model.onnx", "sha256"], None),
    ],
)
def test_a_wrong_type_or_value_is_malformed(tmp_path, held, path, value):
    put(held, path, value)
    with pytest.raises(ArtifactError, match="malformed manifest"):
        Manifest.read(saved(tmp_path, held))


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "ref/../../x", "..", "ref\\x", "C:\\x"])
@pytest.mark.parametrize("where", ["files", "entry"])
def test_a_file_outside_the_folder_is_refused(tmp_path, held, where, name):
    put(held, ["files", name] if where == "files" else ["entry", "model"], held["files"]["model.onnx"])
    if where == "entry":
        held["entry"]["model"] = name
    with pytest.raises(ArtifactError, match="leaves the artifact's folder"):
        Manifest.read(saved(tmp_path, held))


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in pairs:
        yield from places(inner, (*path, step))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300)
@given(seed=st.integers(0, 10**6), value=anything)
def test_whatever_stands_in_a_manifest_it_is_read_or_refused(tmp_path_factory, seed, value):
    folder = tmp_path_factory.getbasetemp()
    MODEL.write(folder)
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    place = random.Random(seed).choice([p for p in places(held) if p])
    put(held, place, value)
    try:
        read = Manifest.read(saved(folder, held))
    except ArtifactError:
        return
    # What was accepted is a manifest like any other.
    read.write(folder)
    assert repr(Manifest.read(folder)) == repr(read)


def test_a_truncated_manifest_is_refused_wherever_it_ends(tmp_path):
    MODEL.write(tmp_path)
    whole = (tmp_path / MANIFEST).read_text(encoding="utf-8").rstrip()
    for end in range(0, len(whole), 37):
        with pytest.raises(ArtifactError):
            Manifest.read(saved(tmp_path, whole[:end]))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ref").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"a model")
    (tmp_path / "ref" / "case_0.npz").write_bytes(b"a case")
    return tmp_path


def of(folder):
    return dataclasses.replace(copy.deepcopy(MODEL), files=list_files(folder))


def test_files_are_listed_by_slashed_path_size_and_hash_and_the_manifest_is_not(folder):
    MODEL.write(folder)
    listed = list_files(folder)
    assert list(listed) == ["model.onnx", "ref/case_0.npz"]
    assert listed["model.onnx"].bytes == 7
    assert listed["model.onnx"].sha256 == sha256(folder / "model.onnx")
    (folder / "ref" / MANIFEST).write_text("{}")
    assert f"ref/{MANIFEST}" in list_files(folder)


def test_the_hash_is_the_files_sha256(folder):
    (folder / "model.onnx").write_bytes(b"abc")
    assert sha256(folder / "model.onnx") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_whole_files_pass(folder):
    manifest = of(folder)
    manifest.check_files(folder)
    manifest.check_files(str(folder), ["model.onnx"])


@pytest.mark.parametrize("name", ["model.onnx", "ref/case_0.npz"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: path.unlink(), "file of the artifact is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"\(truncated\?\); got . bytes; wanted . bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "another size"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "file was altered"),
    ],
)
def test_a_missing_truncated_or_altered_file_is_named(folder, name, change, problem):
    manifest = of(folder)
    change(folder / name)
    with pytest.raises(ArtifactError, match=problem) as caught:
        manifest.check_files(folder)
    assert caught.value.where == str(folder / name)
    other = ({"model.onnx", "ref/case_0.npz"} - {name}).pop()
    manifest.check_files(folder, [other])


def test_a_file_that_is_not_listed_is_not_trusted(folder):
    manifest = of(folder)
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=f"extra.bin is not listed in {MANIFEST}"):
        manifest.check_files(folder, ["extra.bin"])


def test_an_entry_names_a_listed_file_or_is_refused(folder):
    manifest = of(folder)
    assert manifest.file_of(folder, "model") == "model.onnx"
    with pytest.raises(ArtifactError, match="names no file as its 'verify' entry; got model"):
        manifest.file_of(folder, "verify")
    manifest.entry["model"] = "other.onnx"
    with pytest.raises(ArtifactError, match=r"'model' entry; got other\.onnx, which it does not list"):
        manifest.file_of(folder, "model")


def test_a_rung_has_one_of_three_statuses():
    with pytest.raises(ValueError, match="'skipped' is none of passed, failed, not run"):
        Rung("NPU", "skipped")
