import os
import time
from pathlib import Path

import pytest

from tilecut.write_artifact import artifact_folder, check_output
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import Manifest, TensorSpec, list_files


def fill(folder, text="x"):
    (folder / "model.onnx").write_text(text)
    made = (TensorSpec("y", "float32", (1,)),)
    manifest = Manifest("edge", "onnxruntime", "M", {"model": "model.onnx"}, (), made, files=list_files(folder))
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


@pytest.mark.parametrize(
    "path",
    ["file/a", "file/a/b", "n" * 300, "n" * 250, "new/" + "n" * 300, "a\0b", "/proc/none/a", ".", "..", "", "a/.."],
)
def test_a_path_that_cannot_be_made_is_one_error_and_nothing_is_made(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="the output (folder cannot be made|path has no name)"):
        check_output(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]


@pytest.mark.parametrize("path", [3, b"..", True, ["a"]])
def test_what_is_no_path(path):
    with pytest.raises(ArtifactError, match="output: not a path; got"):
        check_output(path)


def test_a_good_path_is_returned_as_it_was_given_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_output("new/er/a") == Path("new/er/a")
    assert not list(tmp_path.iterdir())


def test_a_link_to_an_artifact_stays_and_the_artifact_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    with artifact_folder(tmp_path / "real" / "v1") as folder:
        fill(folder, "old")
    (tmp_path / "current").symlink_to("real/v1")
    with artifact_folder(tmp_path / "current") as folder:
        fill(folder, "new")
    assert (tmp_path / "current").readlink() == Path("real/v1")
    assert (tmp_path / "real" / "v1" / "model.onnx").read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["current", "manifest.json", "model.onnx", "real", "v1"]


@pytest.mark.parametrize("target", ["absent", "link"])
def test_a_link_to_nothing_or_to_itself_is_one_error(target, tmp_path):
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ArtifactError, match="is a link to nothing"):
        check_output(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def test_old_leftovers_of_this_path_are_swept_and_nothing_else(tmp_path):
    old = [".a.0123abcd.tmp", ".a.0123abce.old"]
    others = [".a.0123abcf.tmp", ".b.0123abcd.tmp", ".a.x.tmp", "a.0123abcd.tmp", ".aXb.0123abcd.tmp"]
    long_ago = time.time() - 25 * 60 * 60
    for name in old + others:
        (tmp_path / name / "ref").mkdir(parents=True)
        if name != others[0]:
            os.utime(tmp_path / name, (long_ago, long_ago))
    with pytest.raises(ValueError, match="no"), artifact_folder(tmp_path / "a"):
        raise ValueError("no")
    assert {p.name for p in tmp_path.iterdir()} == {*old, *others}
    with artifact_folder(tmp_path / "a") as folder:
        fill(folder)
    assert {p.name for p in tmp_path.iterdir()} == {"a", *others}
