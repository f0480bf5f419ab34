"""What the command line reads: numbers, made-up inputs, arrays from files, tokenized texts. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tilecut_runtime.cache_layout import BEAMS, LENGTHS, PAST_LENGTHS, POSITIONS
from tilecut_runtime.errors import ArtifactError, InputError
from tilecut_runtime.manifest import DimRange, Manifest
from tilecut_runtime.session import Session


def numbers(option: str, text: str, most: int | None = None) -> list[int]:
    """A comma-separated list of positive integers, none above `most`."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as e:
        raise InputError(option, "not a comma-separated list of integers", got=repr(text), wanted="e.g. 1,8") from e
    if not found or min(found) < 1:
        raise InputError(option, "sizes must be positive", got=repr(text))
    if most is not None and max(found) > most:
        raise InputError(option, "too large", got=max(found), wanted=f"1 to {most}")
    return found


def ids(option: str, text: str) -> list[int]:
    """A comma-separated list of token ids."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as e:
        raise InputError(option, "not a comma-separated list of ids", got=repr(text), wanted="e.g. 50258,50259") from e


def fractions(option: str, text: str) -> list[float]:
    """A comma-separated list of numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as e:
        raise InputError(option, "not a comma-separated list of numbers", got=repr(text), wanted="e.g. 0.3,0.5") from e


def names(text: str) -> list[str]:
    """A comma-separated list of names."""
    return [part.strip() for part in text.split(",")]


def named_numbers(option: str, texts: Sequence[str]) -> dict[str, int]:
    """Numbers by name, of texts such as "neurons=64"; a name may hold "=" itself."""
    found = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not name or not number.strip().isdecimal():
            raise InputError(option, "not a name and a number", got=repr(text), wanted="e.g. neurons=64")
        found[name] = int(number)
    return found


def named_fractions(option: str, texts: Sequence[str]) -> dict[str, float]:
    """Fractions by name, of texts such as "2=0.5"; a name may hold "=" itself."""
    found = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not name or not number.strip().replace(".", "", 1).isdecimal():
            raise InputError(option, "not a name and a fraction", got=repr(text), wanted="e.g. 2=0.5")
        found[name] = float(number)
    return found


def made_up_inputs(manifest: Manifest, batch: int, sequence: int) -> dict[str, np.ndarray]:
    """Inputs of the given sizes: masks of ones, ids of 1, random floats.

    Raises:
        InputError: a size that the model does not allow.
    """
    generator = np.random.default_rng(0)
    out = {}
    for spec in manifest.inputs:
        shape = [
            d if isinstance(d, int) else check_size(manifest, d, batch if d == "batch" else sequence) for d in spec.shape
        ]
        # ValueError: more elements than an array can have.
        try:
            out[spec.name] = (
                generator.standard_normal(shape).astype(spec.dtype)
                if spec.dtype.startswith("float")
                else np.ones(shape, spec.dtype)
            )
        except (MemoryError, ValueError) as e:
            raise InputError(f"input {spec.name}", "too large for this machine", got=shape) from e
    if manifest.generation is not None and manifest.generation.stateful:
        out[POSITIONS][:], out[BEAMS][:] = np.arange(sequence), np.arange(batch)
    elif manifest.generation is not None:
        # Prompts that fill empty caches.
        out[PAST_LENGTHS][:], out[LENGTHS][:] = 0, sequence
    return out


def check_size(manifest: Manifest, name: str, size: int) -> int:
    """The size, which a dynamic dimension is to have.

    Raises:
        InputError: the model does not allow it.
    """
    limits = manifest.dims.get(name, DimRange())
    if size < limits.min or (limits.max is not None and size > limits.max):
        raise InputError(
            f"--{name}" if name in ("batch", "sequence") else f"--sequence ({name})",
            "the model does not allow that size",
            got=size,
            wanted=f"{limits.min} to {limits.max or 'any'}",
        )
    return size


def read_inputs(session: Session, path: Path | None, texts: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Inputs from an .npz file or from texts.

    Raises:
        InputError: neither or both are given, the file cannot be read, or the artifact has no tokenizer.
    """
    if (path is None) == (not texts):
        raise InputError("tilecut run", "give either --inputs or --text")
    if path is not None:
        try:
            with np.load(path, allow_pickle=False) as held:
                return {name: held[name] for name in held.files}
        # numpy, zipfile and zlib each raise their own: for a .npy, junk, a bad checksum, a file that ends early.
        except Exception as e:
            reason = str(e).partition("\n")[0] or type(e).__name__
            raise InputError(str(path), f"cannot be read as .npz ({reason})") from e
    file = session.path / "tokenizer.json"
    if not file.is_file():
        raise InputError("--text", "the artifact holds no tokenizer.json", fix="give --inputs")
    from tokenizers import Tokenizer

    # tokenizers raises a bare Exception.
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:
        raise ArtifactError(str(file), f"tokenizers cannot read it ({e})") from e
    tokenizer.enable_padding()
    limit = session.manifest.dims.get("sequence", DimRange()).max
    if limit:
        tokenizer.enable_truncation(limit)
    encoded = tokenizer.encode_batch(list(texts or []))
    made = {
        "input_ids": [e.ids for e in encoded],
        "attention_mask": [e.attention_mask for e in encoded],
        "token_type_ids": [e.type_ids for e in encoded],
    }
    return {spec.name: np.array(made[spec.name], dtype=spec.dtype) for spec in session.inputs if spec.name in made}


def read_prompt(
    session: Session, prompt: str | None, path: Path | None, others: bool
) -> str | dict[str, np.ndarray]:
    """What is continued: a text, or an encoder's inputs from an .npz file, of one row.

    Raises:
        InputError: both or neither are given, or `others` are, or the file holds several rows.
    """
    if (prompt is None) == (path is None) or others:
        raise InputError("tilecut run", "to generate, give either --prompt or --inputs, and none of --text, --outputs")
    if path is None:
        assert prompt is not None
        return prompt
    arrays = read_inputs(session, path, None)
    if odd := [name for name, array in arrays.items() if array.ndim == 0 or len(array) != 1]:
        got = list(arrays[odd[0]].shape)
        raise InputError(str(path), f"{odd[0]} is not one row, which is printed as it comes", got=got, wanted="[1, ..]")
    return arrays


def write_outputs(path: Path, outputs: Mapping[str, np.ndarray]) -> None:
    """Save outputs as .npz, under the very name that is given.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with path.open("wb") as file:
            np.savez(file, **outputs)  # type: ignore[arg-type]
    except (OSError, ValueError) as e:
        raise InputError(str(path), f"cannot be written ({getattr(e, 'strerror', None) or e})") from e


def make_folder(option: str, path: Path) -> None:
    """Make a folder to write to, where there is none.

    Raises:
        InputError: there is something else, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(option, f"no folder can be made there ({e.strerror or e})", got=str(path)) from e
