"""The artifact's manifest: what the folder holds, with a sha256 for every file.

An artifact is a folder. Its `manifest.json` names the format, the target, the runtime that loads it, inputs and
outputs with dtypes and shapes, every file with size and hash, and how far each verification rung came. Reading it
needs the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tilecut_runtime.cache_layout import CROSS, CacheLayout
from tilecut_runtime.errors import ArtifactError

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one input or output; a dynamic dimension is a name, or an expression of names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class DimRange:
    """The sizes that a dynamic dimension may take; `max` None is unbounded."""

    min: int = 1
    max: int | None = None

    def nearest(self, wanted: int) -> int:
        """The size in the range that is closest to a wanted one."""
        return max(self.min, wanted if self.max is None else min(wanted, self.max))


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 of one file of the artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Rung:
    """One rung of the verification ladder.

    `figure` is the largest error found (or a count), `limit` what it had to stay under; `detail` says what was
    compared, or why the rung was not run and what would run it.
    """

    name: str
    status: str
    detail: str = ""
    figure: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.status not in ("passed", "failed", "not run"):
            raise ValueError(f"Rung {self.name}: status {self.status!r} is none of passed, failed, not run")


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs and dynamic sizes of a model; `returns` as the manifest has it."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange]
    returns: str
    # Input -> how many rows the table has that its numbers are looked up in.
    table_rows: dict[str, int] = field(default_factory=dict)


@dataclass
class Manifest:
    """What `manifest.json` says."""

    target: str
    runtime: str
    model: str
    entry: dict[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange] = field(default_factory=dict)
    returns: str = "mapping"
    # How far outputs may differ from the pruned torch model's, relative to their magnitude; of a quantized model, in norm.
    tolerance: float = 1e-4
    tools: dict[str, str] = field(default_factory=dict)
    created: str = ""
    verification: tuple[Rung, ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)
    format: int = FORMAT
    # What was done to the written model last: a word such as int8.
    quantize: str | None = None
    # How a model with a key-value cache generates.
    generation: CacheLayout | None = None
    # Of the module for PyTorch, where the deployed model's is another: a model with a cache is kept without one there.
    module: Signature | None = None
    # Input -> how many rows the table has that its numbers are looked up in: ids from 0 on, below that.
    table_rows: dict[str, int] = field(default_factory=dict)
    # Of the encoder that runs once before the model; its outputs are inputs of the model, cross.*.
    encoder: Signature | None = None

    @property
    def of_encoder(self) -> Manifest:
        """The manifest with the inputs, outputs and sizes of the encoder, which there must be."""
        assert self.encoder is not None
        return self._with(self.encoder)

    @property
    def of_module(self) -> Manifest:
        """The manifest with the inputs, outputs and sizes of the module for PyTorch."""
        if self.module is None:
            return self
        return self._with(self.module)

    def _with(self, one: Signature) -> Manifest:
        return replace(
            self,
            inputs=one.inputs,
            outputs=one.outputs,
            dims=one.dims,
            returns=one.returns,
            table_rows=one.table_rows,
        )

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: str | Path) -> Manifest:
        """Read and validate `folder/manifest.json`.

        Raises:
            ArtifactError: the folder or its manifest is missing, unreadable, or of another format.
        """
        if not isinstance(folder, str | Path):
            raise ArtifactError("artifact", "not a path", got=type(folder).__name__, wanted="an artifact's folder")
        folder = Path(folder)
        path = folder / MANIFEST
        # Unlike Path's own, os.path's questions have an answer for names that are too long or hold a NUL.
        if not os.path.isdir(folder):
            raise ArtifactError(
                str(folder), "no such artifact folder", fix="give the folder that `tilecut compile` wrote"
            )
        if not path.is_file():
            raise ArtifactError(str(folder), f"not a tilecut artifact: it holds no {MANIFEST}")
        held = read_json(path)
        found = held.get("format") if isinstance(held, dict) else None
        # True and 1.0 equal 1.
        if type(found) is not int or found != FORMAT:
            got = found if isinstance(held, dict) else type(held).__name__
            raise ArtifactError(
                str(path),
                "unknown artifact format",
                got=got,
                wanted=FORMAT,
                fix="load it with the tilecut version that wrote it",
            )
        try:
            return _parse(held)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise ArtifactError(
                str(path), f"malformed manifest ({type(e).__name__}: {e})", fix="compile the model again"
            ) from e

    def file_of(self, folder: str | Path, entry: str) -> str:
        """The name of the file that an entry stands for.

        Raises:
            ArtifactError: the manifest has no such entry, or does not list its file.
        """
        name = self.entry.get(entry)
        if name not in self.files:
            got = f"{name}, which it does not list" if name else ", ".join(self.entry) or "no entry"
            raise ArtifactError(str(folder), f"{MANIFEST} names no file as its {entry!r} entry", got=got)
        return name

    def check_files(self, folder: str | Path, names: Iterable[str] | None = None) -> None:
        """Compare files (all of them, or `names`) with the manifest's sizes and hashes.

        Raises:
            ArtifactError: a file is missing, truncated or altered; the first one is named.
        """
        for name in self.files if names is None else names:
            if name not in self.files:
                raise ArtifactError(str(folder), f"{name} is not listed in {MANIFEST}")
            path, entry = Path(folder) / name, self.files[name]
            if not path.is_file():
                raise ArtifactError(str(path), "file of the artifact is missing", fix="copy the whole folder again")
            size = path.stat().st_size
            if size != entry.bytes:
                raise ArtifactError(
                    str(path),
                    "file has another size than the manifest says (truncated?)",
                    got=f"{size} bytes",
                    wanted=f"{entry.bytes} bytes",
                    fix="copy or compile it again",
                )
            if (digest := sha256(path)) != entry.sha256:
                raise ArtifactError(
                    str(path),
                    "file was altered: sha256 differs from the manifest's",
                    got=digest[:16],
                    wanted=entry.sha256[:16],
                    fix="copy or compile it again",
                )


def read_json(path: Path) -> Any:
    """What a JSON file of an artifact holds.

    Raises:
        ArtifactError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ArtifactError(str(path), f"cannot be read ({e.strerror})") from e
    # ValueError: bad UTF-8, bad JSON, an integer of thousands of digits; RecursionError: brackets without end.
    except (ValueError, RecursionError) as e:
        raise ArtifactError(str(path), f"not valid JSON ({e})", fix="compile the model again") from e


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder` but the manifest, by its path with forward slashes."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): FileEntry(p.stat().st_size, sha256(p)) for p in found}


def _parse(held: dict[str, Any]) -> Manifest:
    def text(value: object) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is no string")
        return value

    def count(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise TypeError(f"{value!r} is no count")
        return value

    def shape(sizes: object) -> tuple[int | str, ...]:
        if not isinstance(sizes, list):
            raise TypeError(f"{sizes!r} is no shape")
        return tuple(s if isinstance(s, str) else count(s) for s in sizes)

    def specs(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        made = tuple(TensorSpec(text(r["name"]), text(r["dtype"]), shape(r["shape"])) for r in rows)
        for spec in made:
            if spec.dtype not in DTYPES:
                raise ValueError(f"{spec.name} has unknown dtype {spec.dtype}")
        return made

    def rung(row: dict[str, Any]) -> Rung:
        made = Rung(**row)
        for words in (made.name, made.detail):
            text(words)
        for number in (made.figure, made.limit):
            if not isinstance(number, int | float | None):
                raise TypeError(f"{number!r} is no number")
        return made

    for name in [*held["files"], *held["entry"].values()]:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name:
            raise ValueError(f"file name {name!r} leaves the artifact's folder")
    tolerance = held["tolerance"]
    if isinstance(tolerance, bool) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}")
    def signature(held: dict[str, Any]) -> Signature:
        dims = {
            k: DimRange(count(v["min"]), None if v["max"] is None else count(v["max"])) for k, v in held["dims"].items()
        }
        for name, limits in dims.items():
            if limits.max is not None and limits.min > limits.max:
                raise ValueError(f"{name} is at least {limits.min} and at most {limits.max}")
        inputs, outputs = specs(held["inputs"]), specs(held["outputs"])
        if not outputs:
            raise ValueError("outputs is empty")
        for spec in (*inputs, *outputs):
            # What is no identifier is an expression of names, such as 2*batch.
            for size in spec.shape:
                if isinstance(size, str) and size.isidentifier() and size not in dims:
                    raise ValueError(f"{spec.name} has a dynamic size {size} that dims lacks")
        # Artifacts of earlier versions do not say.
        rows = {text(name): count(n) for name, n in held.get("table_rows", {}).items()}
        if odd := rows.keys() - {spec.name for spec in inputs}:
            raise ValueError(f"table_rows names no input: {min(odd)}")
        return Signature(inputs, outputs, dims, text(held["returns"]), rows)

    own = signature(held)
    inputs, outputs = own.inputs, own.outputs
    encoder = None if held.get("encoder") is None else signature(held["encoder"])
    given = {spec.name for spec in encoder.outputs} if encoder is not None else set()
    read = {spec.name for spec in inputs if spec.name.startswith(CROSS)} if held.get("generation") is not None else set()
    if odd := given ^ read:
        raise ValueError(f"encoder and model do not both have {min(odd)!r}")
    return Manifest(
        target=text(held["target"]),
        runtime=text(held["runtime"]),
        model=text(held["model"]),
        entry={k: text(v) for k, v in held["entry"].items()},
        inputs=inputs,
        outputs=outputs,
        dims=own.dims,
        returns=own.returns,
        table_rows=own.table_rows,
        tolerance=float(tolerance),
        quantize=None if held.get("quantize") is None else text(held["quantize"]),
        generation=None
        if held.get("generation") is None
        else CacheLayout.parse(held["generation"], tuple(i.name for i in inputs), tuple(o.name for o in outputs)),
        module=None if held.get("module") is None else signature(held["module"]),
        encoder=encoder,
        tools={k: text(v) for k, v in held["tools"].items()},
        created=text(held["created"]),
        verification=tuple(rung(r) for r in held["verification"]),
        files={k: FileEntry(count(v["bytes"]), text(v["sha256"])) for k, v in held["files"].items()},
    )
