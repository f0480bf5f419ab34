"""`tilecut build`: the native package of this machine (here: its CPU), and when `load` takes it."""

import json
import shutil

import numpy as np
import pytest
import torch

from checks import emit, encoder_graph
from tilecut_runtime import native_package
from tilecut_runtime.errors import ArtifactError, VerificationError
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.native_package import build_native
from tilecut_runtime.session import load
from tilecut_targets.cuda.target import CudaTarget

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return emit(CudaTarget("orin"), encoder_graph(), tmp_path_factory.mktemp("cuda") / "artifact")


@pytest.fixture(scope="module")
def built(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "artifact"
    shutil.copytree(plain.folder, folder)
    return folder, build_native(folder, "cpu")


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built[0], tmp_path / "artifact")
    return tmp_path / "artifact"


def test_the_package_is_checked_listed_and_taken(plain, built):
    folder, rung = built
    assert rung.status == "passed" and rung.figure < 1e-5
    manifest = Manifest.read(folder)
    assert manifest.entry["native:cpu"] == "native/cpu/model.pt2"
    manifest.check_files(folder)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    session = load(folder, device="cpu")
    assert session.how == "native package for cpu"
    for case in plain.cases:
        got, want = session.run(case.inputs), load(plain.folder, device="cpu").run(case.inputs)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_another_torch_does_not_take_it(copy):
    facts = copy / "native/cpu/build.json"
    held = json.loads(facts.read_text())
    facts.write_text(json.dumps({**held, "torch": "2.0.0"}))
    manifest = Manifest.read(copy)
    manifest.files["native/cpu/build.json"] = native_package.FileEntry(
        facts.stat().st_size, native_package.sha256(facts)
    )
    manifest.write(copy)
    session = load(copy, device="cpu")
    assert session.how.startswith("exported program on the CPU; the native package is of torch 2.0.0, and this is ")


def test_an_altered_package_is_refused(copy):
    package = copy / "native/cpu/model.pt2"
    package.write_bytes(package.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="file was altered"):
        load(copy, device="cpu")


def test_a_package_that_is_wrong_is_not_taken_in(plain, tmp_path, monkeypatch):
    folder = tmp_path / "artifact"
    shutil.copytree(plain.folder, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, package_path: None)
    wrong = lambda **given: {k: torch.zeros(v.shape) for k, v in plain.cases[0].outputs.items()}
    monkeypatch.setattr(native_package, "_load", lambda package: wrong)
    with pytest.raises(VerificationError, match="it gives other outputs than the pruned model"):
        build_native(folder, "cpu")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p != folder} == {
        p: t for p, t in before.items() if p != folder
    }


def test_what_inductor_refuses_is_one_error(plain, tmp_path, monkeypatch):
    folder = tmp_path / "artifact"
    shutil.copytree(plain.folder, folder)

    def refuse(program, package_path):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    with pytest.raises(ArtifactError, match="Inductor cannot compile the program: RuntimeError: no C\\+\\+ compiler$"):
        build_native(folder, "cpu")


@pytest.mark.skipif(GPU, reason="there is one here")
def test_it_is_built_where_its_device_is(plain):
    with pytest.raises(ArtifactError, match="no such device on this machine; got device='cuda'"):
        build_native(plain.folder, "cuda")


def test_an_edge_artifact_has_none(edge_artifact):
    with pytest.raises(ArtifactError, match="only a cuda artifact has a native package; got an artifact for edge"):
        build_native(edge_artifact.path, "cpu")
