"""Keep what was measured in a folder, so that it is measured once.

A file holds what was measured and its key in clear: processor, runtime versions, sizes, structure. It is found by the key's
hash, so that another machine or version has another file. One that is damaged, or holds another key, is of no use and
says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilecut_runtime.errors import first_line


def kept_file(folder: Path, name: str, key: Mapping[str, Any]) -> Path:
    """Where what was measured for a key is kept."""
    text = json.dumps(key, sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def read_kept(path: Path, key: Mapping[str, Any], field: str) -> Any | str | None:
    """What is kept under `field`: a JSON object; None where there is no file; or why it is of no use."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["key"] != json.loads(json.dumps(key)):
            return "it was measured for another model or machine"
        found = held[field]
    except FileNotFoundError:
        return None
    # Whatever a damaged file holds in place of what was written.
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, RecursionError) as e:
        return first_line(e)
    return found if isinstance(found, dict) else f"its {field} is no object"


def write_kept(path: Path, key: Mapping[str, Any], field: str, found: Mapping[str, Any]) -> None:
    """Keep a JSON object; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"key": dict(key), field: dict(found)}, file, indent=1)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
