"""Keep cost models in a folder, so that later budgets measure nothing.

One that is damaged, or of another key, is measured again and replaced, and the new model says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilecut_runtime.errors import first_line
from tilecut_targets.cost_model import CostModel
from tilecut_targets.keep_json import kept_file, read_kept, write_kept

MODEL = "model"


def file_of(folder: Path, key: Mapping[str, Any]) -> Path:
    """Where the model of a key is kept."""
    return kept_file(folder, "latency", key)


def read_cost_model(path: Path, key: Mapping[str, Any]) -> CostModel | str | None:
    """The model that is kept, None where there is none, or why the file is of no use."""
    held = read_kept(path, key, MODEL)
    if not isinstance(held, dict):
        return held
    try:
        return CostModel.from_json(held)
    # Whatever a damaged file holds in place of what was written.
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as e:
        return first_line(e)


def write_cost_model(path: Path, key: Mapping[str, Any], model: CostModel) -> None:
    """Keep a model; a reader sees the old file or the new one, never a part."""
    write_kept(path, key, MODEL, model.as_json())
