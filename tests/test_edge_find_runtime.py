"""The words behind "edge:": each finds its target; unknown words and packages that are missing give one error."""

from typing import Any

import pytest

from checks import bert_graph
from tilecut_runtime.errors import ArtifactError, ConfigError
from tilecut_runtime.manifest import Manifest, TensorSpec, list_files
from tilecut_runtime.session import load
from tilecut_targets.edge import find_runtime as finding
from tilecut_targets.edge.find_runtime import PACKAGES, RUNTIMES, find_runtime
from tilecut_targets.edge.target import EdgeTarget
from tilecut_targets.find_target import find_target


@pytest.mark.parametrize("word", RUNTIMES)
def test_every_word_finds_the_target_of_its_name(word):
    target: Any = find_target(f"edge:{word}")
    assert str(target) == f"edge:{word}" and target == find_runtime(word) == type(target)()
    assert target.name == "edge" and target.lattice() == EdgeTarget().lattice()
    assert set(target.why) == {"attention", "norms", "rotary", "activations"}


def test_no_word_is_onnxruntime():
    assert find_runtime() == EdgeTarget() == find_target("edge:")


@pytest.mark.parametrize("word", ["x86", "OpenVINO", "openvino,int8", " qnn"])
def test_an_unknown_word_is_refused_with_the_choices(word):
    wanted = " or ".join(["edge", *(f"edge:{w}" for w in RUNTIMES)])
    with pytest.raises(ConfigError, match=f"no such runtime; got edge:{word}; wanted {wanted}$"):
        find_target(f"edge:{word}")


@pytest.mark.parametrize("word", RUNTIMES)
def test_a_runtime_has_no_chips(word):
    with pytest.raises(ConfigError, match=f"has no chips; got edge:v5; wanted edge:{word}"):
        type(find_runtime(word))("v5")


@pytest.mark.parametrize("word", PACKAGES)
def test_a_package_that_is_not_installed_is_named_with_its_extra(word, monkeypatch):
    monkeypatch.setattr(finding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{PACKAGES[word]}, which is not installed; pip install 'tilecut\[{word}\]'"):
        find_target(f"edge:{word}")


@pytest.mark.parametrize("word", PACKAGES)
def test_an_artifact_whose_runtime_is_not_installed_names_the_extra(word, tmp_path, monkeypatch):
    files = {"model": "model.bin", "weights": "weights.bin"}
    for name in files.values():
        (tmp_path / name).write_bytes(b"something")
    spec = TensorSpec("x", "float32", (2,))
    Manifest(f"edge:{word}", word, "Tiny", files, (spec,), (spec,), files=list_files(tmp_path)).write(tmp_path)
    for module in (PACKAGES[word], f"{PACKAGES[word]}.runtime"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ArtifactError, match=rf"runs on {word}, which is not installed; pip install 'tilecut\[{word}\]'"):
        load(tmp_path)


@pytest.mark.parametrize("word", RUNTIMES)
def test_only_profiles_of_devices_and_planned_memory_change_the_sizes(word):
    graph = bert_graph()
    ranges = find_runtime(word).ranges(graph, {"batch": 1, "sequence": 128})
    if word in ("qnn", "coreml"):
        assert {name: (r.min, r.max) for name, r in ranges.items()} == {"batch": (1, 1), "sequence": (128, 128)}
    elif word == "executorch":
        assert {name: (r.min, r.max) for name, r in ranges.items()} == {"batch": (1, 8), "sequence": (1, 512)}
    else:
        assert ranges == graph.ranges
