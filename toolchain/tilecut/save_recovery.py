"""Checkpoints of a recovery: one safetensors file, written atomically, no pickle.

    model.*    the weights            first.*, second.*    AdamW's moments            best.*    the best weights so far

Everything else is JSON in the file's metadata: steps done, losses. The file's name holds the hash of what the run
started from (settings, seed, weights, batches), so that a folder serves several runs, such as the steps of a schedule,
and a checkpoint of another run is never taken for one's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tilecut.recovery_config import Recovery
from tilecut_passes.calibration import Batch
from tilecut_passes.share_batches import process
from tilecut_runtime.errors import ConfigError, first_line

# What may change between a run and its resumption.
FREE = {"checkpoint", "checkpoint_every", "device", "steps", "floor"}


@dataclass
class State:
    """Where a run is: tensors by kind and parameter, and numbers."""

    step: int = 0
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


def checkpoint_path(
    folder: str | Path, config: Recovery, seed: int, tensors: Mapping[str, Tensor], batches: Sequence[Batch]
) -> Path:
    """The file of the run that starts from these.

    Raises:
        ConfigError: the folder cannot be made.
    """
    digest = hashlib.sha256(f"{config.model_dump_json(exclude=FREE)} {seed}".encode())
    inputs = (
        (f"{i} {name}", t)
        for i, batch in enumerate(batches)
        for name, t in [*sorted(batch.inputs.items()), ("labels", batch.labels)]
        if t is not None
    )
    for name, tensor in [*sorted(tensors.items()), *inputs]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).numpy().tobytes())
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError("Recovery", f"checkpoint is no folder to write to ({e.strerror})", got=str(folder)) from e
    return Path(folder) / f"recovery-{digest.hexdigest()[:16]}.safetensors"


def write_checkpoint(path: Path, state: State) -> None:
    """Replace the checkpoint at `path`; the main process writes, the others do nothing.

    Raises:
        ConfigError: it cannot be written; the one before is as it was.
    """
    if process()[0] != 0:
        return
    flat = {f"{kind}.{name}": t.detach().cpu().contiguous() for kind, held in state.tensors.items() for name, t in held.items()}
    about = {"step": str(state.step), "numbers": json.dumps(state.numbers)}
    scratch = path.with_suffix(f".{os.getpid()}.part")
    try:
        save_file(flat, scratch, metadata=about)
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        os.replace(scratch, path)
    except (OSError, SafetensorError) as e:
        raise ConfigError(str(path), f"the checkpoint cannot be written ({first_line(e)})") from e
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def read_checkpoint(path: Path, kinds: Iterable[str], like: Mapping[str, Tensor]) -> State | None:
    """The state at `path`, or None where there is none. A damaged file is put aside, with a warning."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            state = State(int(about["step"]), {}, json.loads(about["numbers"]))
            for kind in kinds:
                state.tensors[kind] = {name: file.get_tensor(f"{kind}.{name}") for name in like}
        if odd := [n for held in state.tensors.values() for n, t in held.items() if t.shape != like[n].shape]:
            raise ValueError(f"{odd[0]} has another shape")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        aside = path.with_suffix(".damaged")
        if process()[0] == 0:
            os.replace(path, aside)
            warnings.warn(
                f"{path}: the checkpoint cannot be read ({first_line(e)}); recovery starts over, the file is kept as "
                f"{aside.name}",
                UserWarning,
                stacklevel=2,
            )
        return None
    return state
