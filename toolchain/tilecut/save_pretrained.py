"""A pruned model as a folder of plain files.

    model.safetensors        the weights, under the names of the original `state_dict`
    config.json              the original's config, and under "tilecut" the graph's inputs and outputs
    generation_config.json   where the model generates
    plan.json                which units of which group stayed
    rotations.safetensors    what turned hidden widths, where the plan names any
    module.pt2               the graph, without weights

Hashes tie plan and graph together. Weights have none: they may be trained on, and have to fit the graph alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tilecut.artifact import MODULE, PLAN
from tilecut.write_weights import write_weights
from tilecut_passes.plan import ROTATIONS
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.torch_program import WEIGHTS

if TYPE_CHECKING:
    from tilecut.pruned_pretrained import Source

FORMAT = 1
# The key of config.json.
ENTRY = "tilecut"


def save_pretrained(model: Any, source: Source, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Write a model; `state` None takes its own weights. Other files of the folder stay.

    Raises:
        ArtifactError: the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(str(folder), "the output path is a file", fix="name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach() for name, tensor in (state or model.state_dict()).items()}
    # Under another name first: the old weights may be mapped from the file that is replaced.
    fresh = folder / f".{WEIGHTS}.tmp"
    write_weights(tensors, fresh, metadata={"format": "pt"})
    fresh.replace(folder / WEIGHTS)
    held = {MODULE: source.program, PLAN: source.plan}
    for name, content in held.items():
        (folder / name).write_bytes(content)
    # plan.json has its hash.
    if source.rotations is not None:
        (folder / ROTATIONS).write_bytes(source.rotations)
    else:
        (folder / ROTATIONS).unlink(missing_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [source.model]
    entry = {
        "format": FORMAT,
        "model": source.model,
        "inputs": [asdict(spec) for spec in source.inputs],
        "outputs": [asdict(spec) for spec in source.outputs],
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in held.items()},
    }
    described = {**json.loads(config.to_json_string(use_diff=True)), ENTRY: entry}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(str(folder))
