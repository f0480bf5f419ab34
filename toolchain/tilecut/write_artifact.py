"""Write an artifact's folder so that it is there whole or not at all.

Everything is written into a temporary sibling, flushed to disk, and renamed into place; an artifact that was there is
replaced only then. A folder that is no artifact of ours is never touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import MANIFEST, Manifest


def check_output(path: Path) -> None:
    """Refuse an output path that holds anything but an artifact.

    Raises:
        ArtifactError: a file, or a folder with other content.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(str(path), "the output path is a file", fix="name a folder")
    if not any(path.iterdir()):
        return
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            str(path),
            "the output folder exists and is not a tilecut artifact",
            fix="name another folder, or remove it yourself",
        )
    try:
        Manifest.read(path)
    except ArtifactError as e:
        raise ArtifactError(
            str(path),
            f"the output folder holds a {MANIFEST} that is not tilecut's ({e.problem})",
            fix="name another folder, or remove it yourself",
        ) from e


@contextmanager
def artifact_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well and vanishes when it does not."""
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = secrets.token_hex(4)
    temporary, old = path.with_name(f".{path.name}.{tag}.tmp"), path.with_name(f".{path.name}.{tag}.old")
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        check_output(path)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _flush_one(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
