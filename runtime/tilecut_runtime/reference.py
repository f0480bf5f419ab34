"""Reference inputs and outputs that travel with an artifact in `ref/`, and what it means to agree with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tilecut_runtime.cache_layout import MASK
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import Manifest, Rung

if TYPE_CHECKING:
    from tilecut_runtime.session import Session

FOLDER = "ref"
# What cases' file names begin with: of the model, and of its encoder.
MODEL, ENCODER = "case", "encoder"
# Larger numbers stand for infinity; outputs smaller than this are compared absolutely.
HUGE, SMALL = 1e30, 1e-3
# So many numbers of an output are compared at a time: the logits of a large vocabulary in float64 are gigabytes.
NUMBERS = 1 << 22
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Inputs, expected outputs, and for each output a bool over its leading dimensions: True where it must agree."""

    inputs: Arrays
    outputs: Arrays
    valid: Arrays

    def error(self, got: Mapping[str, np.ndarray]) -> float:
        """The largest difference on valid rows, relative to the output's largest magnitude (see `scaled_error`).

        Of outputs that are no floating point (ids, choices) it is the share that differs: how far ids are apart says nothing.
        """
        worst = 0.0
        for name, want in self.outputs.items():
            have = got[name]
            if have.shape != want.shape:
                return math.inf
            rows = self.valid[name]
            if want.dtype.kind == "f":
                error = scaled_error(want[rows], have[rows])
            else:
                error = float((want[rows] != have[rows]).mean()) if want[rows].size else 0.0
            worst = max(worst, error)
        return worst

    def drift(self, got: Mapping[str, np.ndarray]) -> tuple[float, float]:
        """How far a quantized model is off on valid rows: the worst output's |want - got| / |want|, and 1 - its mean cosine.

        Numbers that stand for infinity are left out of both; of outputs that are no floating point it is as in `error`.
        """
        relative = turned = 0.0
        for name, want in self.outputs.items():
            have, rows = got[name], self.valid[name]
            if have.shape != want.shape:
                return math.inf, math.inf
            if want.dtype.kind != "f":
                relative = max(relative, float((want[rows] != have[rows]).mean()) if want[rows].size else 0.0)
                continue
            a, b = want[rows].astype(np.float64), have[rows].astype(np.float64)
            if not a.size:
                continue
            if not np.isfinite(b[np.abs(a) < HUGE]).all():
                return math.inf, math.inf
            a, b = (np.where(np.abs(a) < HUGE, x, 0.0) for x in (a, b))
            relative = max(relative, float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), SMALL)))
            # One number has no direction.
            if a.ndim > 1 and a.shape[-1] > 1:
                lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
                cosine = np.where(lengths > 0, (a * b).sum(-1) / np.maximum(lengths, 1e-300), 1.0)
                turned = max(turned, float(1 - cosine.mean()))
        return relative, turned

    @property
    def size(self) -> str:
        """The shape of the first input, for messages: 2x13."""
        return "x".join(map(str, next(iter(self.inputs.values())).shape))


def agreement_rungs(
    name: str,
    cases: Sequence[Case],
    run: Callable[[Arrays], Mapping[str, np.ndarray]],
    limit: float,
    detail: str,
    quantized: bool,
) -> list[Rung]:
    """How far outputs are from the cases': a rung called `name`, or those of a quantized model. One case's are held at a time."""
    outputs = (run(case.inputs) for case in cases)
    if quantized:
        return drift_rungs(cases, outputs, limit, detail)
    error = max(case.error(got) for case, got in zip(cases, outputs, strict=True))
    return [Rung(name, "passed" if error <= limit else "failed", detail, error, limit)]


def drift_rungs(
    cases: Sequence[Case], outputs: Iterable[Mapping[str, np.ndarray]], limit: float, detail: str
) -> list[Rung]:
    """The rungs of a quantized model: relative error and direction. Vectors that differ by e have cosine 1 - e^2/2."""
    drifts = [case.drift(got) for case, got in zip(cases, outputs, strict=True)]
    found = zip(
        ("quantized model: relative error", "quantized model: 1 - cosine"),
        (max(figures) for figures in zip(*drifts)),
        (limit, limit**2 / 2),
    )
    return [Rung(name, "passed" if x <= most else "failed", detail, x, most) for name, x, most in found]


def scaled_error(want: np.ndarray, got: np.ndarray) -> float:
    """The largest |want - got|, relative to the largest |want| (at least SMALL); inf for NaN.

    Numbers that stand for infinity (a banned logit's lowest float) are compared with themselves: as a scale they would
    hide every other error. Equal infinities are equal.
    """
    pairs = lambda: (
        (want.reshape(-1)[i : i + NUMBERS].astype(np.float64), got.reshape(-1)[i : i + NUMBERS].astype(np.float64))
        for i in range(0, want.size, NUMBERS)
    )
    scale = SMALL
    for a, _ in pairs():
        ordinary = np.abs(a[np.abs(a) < HUGE])
        scale = max(scale, float(ordinary.max(initial=0.0)))
    worst = 0.0
    for a, b in pairs():
        with np.errstate(invalid="ignore"):
            difference = np.where(a == b, 0.0, np.abs(a - b))
            error = float((difference / np.where(np.abs(a) < HUGE, scale, np.abs(a))).max())
        if error != error:
            return math.inf
        worst = max(worst, error)
    return worst


def write_cases(cases: Sequence[Case], folder: Path, of: str = MODEL) -> None:
    """Write each case as `ref/case_<i>.npz`; `of` is what stands in the place of `case`."""
    (folder / FOLDER).mkdir(exist_ok=True)
    for i, case in enumerate(cases):
        arrays = {
            f"{part}:{name}": array
            for part in ("inputs", "outputs", "valid")
            for name, array in getattr(case, part).items()
        }
        np.savez(folder / FOLDER / f"{of}_{i}.npz", **arrays)  # type: ignore[arg-type]


def read_cases(folder: Path, manifest: Manifest, of: str = MODEL) -> list[Case]:
    """The artifact's reference cases, after a check of their hashes; those of the encoder with `manifest.of_encoder`.

    Raises:
        ArtifactError: there are none, or one is missing, altered or not of this artifact.
    """
    names = sorted(f for f in manifest.files if f.startswith(f"{FOLDER}/{of}_"))
    if not names:
        raise ArtifactError(str(folder), f"no reference inputs in {FOLDER}/")
    manifest.check_files(folder, names)
    cases = []
    for name in names:
        # numpy, zipfile and zlib each raise their own on a damaged file.
        try:
            cases.append(_read_case(folder / name, manifest))
        except Exception as e:
            reason = f"{type(e).__name__}: {e}"
            raise ArtifactError(str(folder / name), f"not a reference case ({reason})") from e
    return cases


def _read_case(path: Path, manifest: Manifest) -> Case:
    parts: dict[str, Arrays] = {"inputs": {}, "outputs": {}, "valid": {}}
    with np.load(path, allow_pickle=False) as held:
        for key in held.files:
            part, _, tensor = key.partition(":")
            parts[part][tensor] = held[key]
    case = Case(**parts)
    for arrays, specs in ((case.inputs, manifest.inputs), (case.outputs, manifest.outputs)):
        if set(arrays) != {spec.name for spec in specs}:
            raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}")
    for name, want in case.outputs.items():
        rows = case.valid[name]
        if rows.dtype != bool or rows.shape != want.shape[: rows.ndim]:
            raise ValueError(f"the rows of {name} that count are {rows.dtype} {list(rows.shape)}")
    return case


def verify_on_device(folder: Path, device: str | None = None) -> list[Rung]:
    """What can be verified where only the runtime is installed: hashes, and the session against the references.

    The limit is the one that the artifact was compiled under.

    Raises:
        ArtifactError: a file is missing, truncated or altered, or the artifact cannot run here.
    """
    from tilecut_runtime.session import load

    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    rungs = [Rung("hashes", "passed", f"{len(manifest.files)} files are as the manifest says")]
    limit = manifest.tolerance
    session = load(folder, device)
    cases = read_cases(folder, manifest)
    sizes = ", ".join(case.size for case in cases)
    detail = f"{session.how} on {session.device} against the outputs in {FOLDER}/, inputs of {sizes}"
    quantized = manifest.quantize is not None
    rungs += agreement_rungs("artifact equals reference", cases, session.run, limit, detail, quantized)
    if manifest.encoder is not None:
        read = read_cases(folder, manifest.of_encoder, ENCODER)
        found = agreement_rungs("artifact equals reference", read, session.encoder.run, limit, detail, quantized)
        rungs += of_encoder(found)
    if manifest.generation is not None and manifest.generation.stateful:
        rungs.append(decoding_rung(session, cases, limit))
    return rungs


def decoding_rung(session: Session, cases: Sequence[Case], limit: float) -> Rung:
    """How far the last token's logits are from the cases' when it is read behind a cache that the runtime holds."""
    layout = session.decoder.layout
    worst = 0.0
    for case in cases:
        tokens, lengths = case.inputs[layout.tokens], case.inputs[MASK].sum(1)
        # A case's rows are padded on the left; steps take them padded on the right.
        rows = [tokens[i, tokens.shape[1] - n :] for i, n in enumerate(lengths)]
        if lengths.min() < 2:
            continue
        padded = np.stack([np.pad(row, (0, tokens.shape[1] - len(row))) for row in rows])
        decoding = session.decoder.start(len(rows), tokens.shape[1])
        decoding.step(padded[:, :-1], lengths - 1)
        decoding.accept(lengths - 1)
        got = decoding.step(np.array([[row[-1]] for row in rows]), np.ones(len(rows), np.int64))
        last = Case({}, {layout.logits: case.outputs[layout.logits]}, {layout.logits: case.valid[layout.logits]})
        found = {layout.logits: got[:, None]}
        worst = max(worst, last.error(found) if session.manifest.quantize is None else last.drift(found)[0])
    detail = f"{session.how} on {session.device}, the last token of every case read behind the cache of those before it"
    return Rung("decoding equals reference", "passed" if worst <= limit else "failed", detail, worst, limit)


def of_encoder(rungs: Sequence[Rung]) -> list[Rung]:
    """Rungs as those of an artifact's encoder."""
    return [replace(rung, name=f"encoder: {rung.name}") for rung in rungs]
