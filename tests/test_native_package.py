"""`tilecut build`: the native package of this machine (here: its CPU), and when `load` takes it."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from triton import knobs

from checks import emit, encoder_graph
from tilecut import compile_pruned
from tilecut_runtime import native_package
from tilecut_runtime.errors import ArtifactError, VerificationError
from tilecut_runtime.manifest import Manifest, list_files
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
    assert re.fullmatch(r"native/cpu-[0-9a-f]{12}/model\.pt2", manifest.entry["native:cpu"])
    assert manifest.verification[-1] == rung
    manifest.check_files(folder)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    session = load(folder, device="cpu")
    assert session.how == "native package for cpu"
    for case in plain.cases:
        got, want = session.run(case.inputs), load(plain.folder, device="cpu").run(case.inputs)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def package_of(folder):
    return folder / Manifest.read(folder).entry["native:cpu"]


@pytest.mark.parametrize("change", [{"torch": "2.0.0"}, {"instructions": "z80"}])
def test_another_torch_or_processor_does_not_take_it(copy, change):
    facts = package_of(copy).with_name("build.json")
    facts.write_text(json.dumps({**json.loads(facts.read_text()), **change}))
    manifest = Manifest.read(copy)
    manifest.files = list_files(copy)
    manifest.write(copy)
    ((what, built),) = change.items()
    session = load(copy, device="cpu")
    assert session.how.startswith(f"exported program; the native package is of {what} {built}, and this is ")


def test_a_second_build_takes_the_place_of_the_first(copy):
    manifest, package = Manifest.read(copy), package_of(copy)
    files = {**manifest.files}
    other = copy.parent / "made"
    other.mkdir()
    for name in ("model.pt2", "build.json"):
        shutil.copy(package.with_name(name), other / name)
    with (other / "model.pt2").open("ab") as file:
        file.write(b" ")
    native_package._take_in(copy, "cpu", other, manifest.verification[-1])
    again = Manifest.read(copy)
    again.check_files(copy)
    assert package_of(copy) != package and not package.parent.exists()
    assert len(again.files) == len(files) and len(again.verification) == len(manifest.verification)
    assert again.files == list_files(copy)


def test_two_threads_share_a_session(built, plain):
    session = load(built[0], device="cpu")
    case = plain.cases[0]
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(lambda i: case.error(session.run(case.inputs)), range(20), timeout=120))
    assert max(errors) < 1e-5


def test_an_altered_package_is_refused(copy):
    package = package_of(copy)
    package.write_bytes(package.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="file was altered"):
        load(copy, device="cpu")


def test_a_package_that_is_wrong_is_not_taken_in(plain, tmp_path, monkeypatch):
    folder = tmp_path / "artifact"
    shutil.copytree(plain.folder, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, package_path: None)
    wrong = lambda **given: {k: torch.zeros(v.shape) for k, v in plain.cases[0].outputs.items()}
    monkeypatch.setattr(native_package, "_load", lambda package, device: wrong)
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
    with pytest.raises(ArtifactError, match="torch cannot build the native package: RuntimeError: no C\\+\\+ compiler$"):
        build_native(folder, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_the_gpu_has_one_too(tmp_path):
    """Carried cubins are taken, nothing is compiled for attention, and the package agrees."""
    from tilecut_runtime.torch_runner import architecture_of

    arch = architecture_of(tmp_path, "cuda")
    plain = emit(CudaTarget(f"{arch},bf16"), encoder_graph(), tmp_path / "artifact")
    session = load(plain.folder)
    assert session.how.startswith("exported program, ") and "0 precompiled" not in session.how
    compiled = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(cache_hit)
        for case in plain.cases:
            assert case.error(session.run(case.inputs)) < plain.manifest.tolerance
    assert not compiled
    assert build_native(plain.folder, "cuda").status == "passed"
    native = load(plain.folder)
    assert native.how.startswith(f"native package for {arch}, ")
    for case in plain.cases:
        assert case.error(native.run(case.inputs)) < plain.manifest.tolerance


@pytest.mark.slow
def test_a_packed_program_in_16_bits_has_one(tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids, places = torch.randint(50, (2, 12)), torch.tensor([[*range(5), *range(7)], [*range(12)]])
    given = {"input_ids": ids, "position_ids": places}
    artifact = compile_pruned(
        model, "cuda:orin,bf16", given, config=None, output=tmp_path / "artifact", measure=False
    )
    rung = build_native(artifact.path, "cpu")
    assert rung.status == "passed" and rung.figure is not None and rung.figure < 2e-2
    arrays = {k: v.numpy() for k, v in given.items()}
    session = load(artifact.path, device="cpu")
    assert session.how == "native package for cpu"
    want = model(**given, use_cache=False).logits.detach().numpy()
    np.testing.assert_allclose(session.run(arrays)["logits"], want, atol=2e-2)


@pytest.mark.skipif(GPU, reason="there is one here")
def test_it_is_built_where_its_device_is(plain):
    with pytest.raises(ArtifactError, match="no such device on this machine; got device='cuda'"):
        build_native(plain.folder, "cuda")


def test_an_edge_artifact_has_none(edge_artifact):
    with pytest.raises(ArtifactError, match="only a cuda artifact has a native package; got an artifact for edge"):
        build_native(edge_artifact.path, "cpu")
