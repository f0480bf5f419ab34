"""Write an artifact's folder so that it is there whole or not at all.

Everything is written into a temporary sibling, flushed to disk, and renamed into place; an artifact that was there is
replaced only then. A folder that is no artifact of ours is never touched. Where the path is a link to an artifact, the
artifact is replaced and the link stays.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import MANIFEST, Manifest

# What a compile that was killed left behind goes at the next one to the same path, when it is this old.
LEFTOVER_SECONDS = 24 * 60 * 60


def check_artifact(path: Path) -> None:
    """Refuse a folder with content that is no artifact."""
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


def check_output(path: str | Path, check: Callable[[Path], None] = check_artifact) -> Path:
    """The output path, refused when it holds anything but an artifact or cannot be written.

    Args:
        check: refuses a folder whose content is not to be replaced.

    Raises:
        ArtifactError: no path, a file, a folder with other content, a link to nothing, or a folder that cannot be made.
    """
    if not isinstance(path, str | Path):
        raise ArtifactError("output", "not a path", got=type(path).__name__, wanted="the name of a folder")
    path = Path(path)
    if path.name in ("", ".."):
        raise ArtifactError(str(path), "the output path has no name of its own", fix="name a folder to be made")
    # RuntimeError: links in a circle.
    try:
        if path.is_symlink() and not path.exists():
            raise ArtifactError(str(path), "the output path is a link to nothing", fix="remove it, or make its target")
        folder = path.resolve()
        _check_content(folder, check)
        _rehearse(folder)
    except (OSError, ValueError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ArtifactError(repr(str(path)), f"the output folder cannot be made ({reason})") from e
    return path


def _check_content(path: Path, check: Callable[[Path], None]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(str(path), "the output path is a file", fix="name a folder")
    if any(path.iterdir()):
        check(path)


def _rehearse(path: Path) -> None:
    """Make the missing folders under a name that nobody else has, and remove them again."""
    above = next(p for p in path.parents if p.exists())
    with tempfile.TemporaryDirectory(prefix=".", dir=above) as scratch:
        _siblings(Path(scratch) / path.relative_to(above))[0].mkdir(parents=True)


def _siblings(path: Path) -> tuple[Path, Path]:
    """Where `path` is written, and where what was there waits meanwhile."""
    tag = secrets.token_hex(4)
    return path.with_name(f".{path.name}.{tag}.tmp"), path.with_name(f".{path.name}.{tag}.old")


@contextmanager
def artifact_folder(path: str | Path, check: Callable[[Path], None] = check_artifact) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well and vanishes when it does not."""
    path = check_output(path, check).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _siblings(path)
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        check_output(path, check)
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
    _sweep(path)


def _sweep(path: Path) -> None:
    """Remove what killed compiles to `path` left beside it; younger folders may be of one that is running."""
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.(tmp|old)")
    with suppress(OSError):
        for left in path.parent.iterdir():
            if ours.fullmatch(left.name) and left.lstat().st_mtime < time.time() - LEFTOVER_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
