import os

import pytest

from tilecut.write_artifact import artifact_folder, check_output
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import Manifest, list_files


def fill(folder, text="x"):
    (folder / "model.onnx").write_text(text)
    manifest = Manifest("edge", "onnxruntime", "M", {"model": "model.onnx"}, (), (), files=list_files(folder))
    manifest.write(folder)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(error, tmp_path):
    with artifact_folder(tmp_path / "a") as folder:
        fill(folder, "old")
    with pytest.raises(error), artifact_folder(tmp_path / "a") as folder:
        fill(folder, "new")
        raise error
    assert (tmp_path / "a" / "model.onnx").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_old_artifact_goes_only_when_the_new_one_is_whole(tmp_path):
    with artifact_folder(tmp_path / "a") as folder:
        fill(folder, "old")
        (folder / "stale").write_text("")
    with artifact_folder(tmp_path / "a") as folder:
        fill(folder, "new")
        assert (tmp_path / "a" / "model.onnx").read_text() == "old"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["manifest.json", "model.onnx"]


def test_someone_elses_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(ArtifactError, match="is not a tilecut artifact"), artifact_folder(tmp_path / "a") as folder:
        fill(folder)
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine.txt").write_text("mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "mine.txt"]


def test_a_rename_that_fails_brings_the_old_one_back(tmp_path, monkeypatch):
    with artifact_folder(tmp_path / "a") as folder:
        fill(folder, "old")
    real = os.rename

    def refuse(source, target, **options):
        if str(source).endswith(".tmp"):
            raise OSError("no space")
        real(source, target, **options)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="no space"), artifact_folder(tmp_path / "a") as folder:
        fill(folder, "new")
    monkeypatch.undo()
    assert (tmp_path / "a" / "model.onnx").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_empty_folder_may_be_taken(tmp_path):
    (tmp_path / "a").mkdir()
    check_output(tmp_path / "a")
    with artifact_folder(tmp_path / "a") as folder:
        fill(folder)
    assert (tmp_path / "a" / "model.onnx").is_file()
