"""Keep cost models in a folder, so that later budgets measure nothing.

A file holds the model and its key in clear: processor, runtime versions, sizes, the model's structure. It is found by
the key's hash, so that another machine or version has another file. One that is damaged, or holds another key, is
measured again and replaced, and the new model says so.
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
from tilecut_targets.cost_model import CostModel


def file_of(folder: Path, key: Mapping[str, Any]) -> Path:
    """Where the model of a key is kept."""
    text = json.dumps(key, sort_keys=True)
    return folder / f"latency-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def read_cost_model(path: Path, key: Mapping[str, Any]) -> CostModel | str | None:
    """The model that is kept, None where there is none, or why the file is of no use."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        return first_line(e)
    try:
        held = json.loads(text)
        if held["key"] != json.loads(json.dumps(key)):
            return "it was measured for another model or machine"
        return CostModel.from_json(held["model"])
    # Whatever a damaged file holds in place of what was written.
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as e:
        return first_line(e)


def write_cost_model(path: Path, key: Mapping[str, Any], model: CostModel) -> None:
    """Keep a model; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"key": dict(key), "model": model.as_json()}, file, indent=1)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
