"""The first rung of the targets that write ONNX: a valid file passes, anything else is one error."""

import onnx
import pytest

from checks import emit, mlp_graph
from tilecut_runtime.errors import ArtifactError
from tilecut_targets.check_onnx import check_onnx
from tilecut_targets.edge.target import EdgeTarget


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return emit(EdgeTarget(), mlp_graph(), tmp_path_factory.mktemp("edge") / "a").folder / "model.onnx"


def test_a_valid_file_passes(written):
    rung = check_onnx(written.parent, written.name)
    assert (rung.name, rung.status, rung.detail) == ("onnx checker", "passed", "model.onnx is valid ONNX")


def unknown_op(path):
    model = onnx.load(str(path))
    model.graph.node[0].op_type = "Toes"
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b"junk"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        unknown_op,
    ],
    ids=["truncated", "junk", "empty", "missing", "unknown op"],
)
def test_a_damaged_file_is_one_error(damage, written, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(written.read_bytes())
    damage(path)
    with pytest.raises(ArtifactError, match=r"model\.onnx: not valid ONNX") as caught:
        check_onnx(tmp_path, "model.onnx")
    assert "\n" not in str(caught.value)
