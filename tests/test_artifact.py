import json
import shutil

import onnx
import pytest

from tilecut import Artifact, load
from tilecut_passes.plan import PrunePlan
from tilecut_runtime.errors import ArtifactError, TilecutError
from tilecut_runtime.manifest import Manifest, list_files
from tilecut_runtime.reference import verify_on_device


@pytest.fixture
def mine(edge_artifact, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(edge_artifact.path, tmp_path / "artifact")


def test_an_artifact_can_be_opened_again(edge_artifact):
    again = Artifact(str(edge_artifact.path))
    assert again.plan == edge_artifact.plan
    assert again.report == edge_artifact.report
    assert "target='edge'" in repr(again)
    assert [r.status for r in again.verify()] == ["passed"] * len(again.verify())


@pytest.mark.parametrize("which", ["edge_artifact", "cuda_artifact", "ascend_artifact"])
def test_every_file_is_in_the_manifest_and_none_is_pickled(which, request):
    artifact = request.getfixturevalue(which)
    files = {p.relative_to(artifact.path).as_posix() for p in artifact.path.rglob("*") if p.is_file()}
    assert files == {*artifact.manifest.files, "manifest.json"}
    assert not [f for f in files if f.endswith((".pkl", ".bin", ".pt")) and f != "graph/weights.bin"]
    text = (artifact.path / "plan.json").read_text() + (artifact.path / "manifest.json").read_text()
    assert "/home" not in text and "site-packages" not in text
    assert next(r.name for r in artifact.manifest.verification) == "cut equals masked dense"


def test_the_plan_says_which_units_of_which_parameters(edge_artifact):
    held = json.loads((edge_artifact.path / "plan.json").read_text())
    assert held["target"] == "edge" and held["at"]["sequence"] == 16
    heads = next(g for g in held["groups"] if g["name"] == "encoder.layer.0.attention:heads")
    member = next(m for m in heads["members"] if m["parameter"] == "encoder.layer.0.attention.self.query.weight")
    assert member == {**member, "dim": 0, "start": 0, "view": [4, 16], "axis": 0}
    assert PrunePlan.from_json(held) == edge_artifact.plan


@pytest.mark.parametrize(
    "name", ["model.onnx", "plan.json", "report.json", "model.safetensors", "module.pt2", "config.json"]
)
@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_file_is_named(name, damage, mine):
    path = mine / name
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-7])
    else:
        path.unlink()
    artifact = Artifact(mine)
    with pytest.raises(ArtifactError, match=name):
        artifact.verify()
    users = {
        "model.onnx": lambda: load(mine),
        "plan.json": lambda: artifact.plan,
        "report.json": lambda: artifact.report,
        "model.safetensors": artifact.module,
        "module.pt2": artifact.module,
    }
    if name in users:
        with pytest.raises(ArtifactError, match=name):
            users[name]()


def test_a_wrong_model_with_a_right_hash_fails_verification(mine):
    model = onnx.load(mine / "model.onnx")
    weight = next(i for i in model.graph.initializer if len(i.dims) == 2 and min(i.dims) > 16)
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed[:, 3] += 1.0
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(model, mine / "model.onnx")
    manifest = Manifest.read(mine)
    manifest.files = list_files(mine)
    manifest.write(mine)
    statuses = {r.name: r.status for r in Artifact(mine).verify()}
    assert statuses == {"hashes": "passed", "onnx checker": "passed", "artifact equals pruned model": "failed"}
    assert [r.status for r in verify_on_device(mine)] == ["passed", "failed"]


@pytest.mark.parametrize("path", ["absent", "empty"])
def test_a_folder_that_is_no_artifact(path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TilecutError, match=path):
        Artifact(tmp_path / path)


DEEP = "[" * 100_000


@pytest.mark.parametrize("content", ["", "{", "[]", DEEP, '{"format": 1}', '{"format": 1, "groups": 1e999}'])
@pytest.mark.parametrize("name", ["plan.json", "report.json"])
def test_a_forged_file_whose_hash_fits_is_one_error(name, content, mine):
    (mine / name).write_text(content)
    manifest = Manifest.read(mine)
    manifest.files = list_files(mine)
    manifest.write(mine)
    artifact = Artifact(mine)
    if name == "report.json" and content.startswith('{"'):
        assert artifact.report == json.loads(content)
        return
    with pytest.raises(ArtifactError, match=name):
        _ = artifact.plan if name == "plan.json" else artifact.report


@pytest.mark.parametrize("path", [None, 3, b".."])
def test_what_is_no_path(path):
    with pytest.raises(ArtifactError, match="not a path"):
        Artifact(path)
