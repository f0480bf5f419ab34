"""`from_pretrained`: a pruned Hugging Face model from a folder, as transformers' pipelines and Trainer take it.

The folder is what `save_pretrained` of such a model wrote, or an artifact that was compiled from a Hugging Face model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilecut.artifact import MODULE, PLAN, Artifact
from tilecut.save_pretrained import ENTRY, FORMAT
from tilecut_passes.plan import ROTATIONS, PrunePlan
from tilecut_runtime.errors import ArtifactError, PlanError, first_line
from tilecut_runtime.manifest import MANIFEST, TensorSpec, read_json
from tilecut_runtime.torch_program import WEIGHTS, read_program

if TYPE_CHECKING:
    from tilecut.pruned_pretrained import Source

CONFIG, GENERATION = "config.json", "generation_config.json"


def from_pretrained(folder: str | Path) -> Any:
    """A pruned model as a `PreTrainedModel` of its original class.

    Raises:
        ArtifactError: no such folder or not of such a model, files that do not belong together, weights that do not fit
            the plan, a class that transformers lacks, or no transformers.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ArtifactError(
            str(folder),
            f"not the folder of a pruned Hugging Face model: it holds no {CONFIG}",
            wanted="what save_pretrained of a pruned model, or compile_pruned of a Hugging Face model, wrote",
        )
    if (folder / MANIFEST).is_file():
        return of_artifact(Artifact(folder))
    held = read_json(folder / CONFIG)
    entry = held.get(ENTRY) if isinstance(held, dict) else None
    if not isinstance(entry, dict):
        raise ArtifactError(
            str(folder / CONFIG),
            f"not the config of a pruned model: it has no {ENTRY!r} entry",
            fix="load the model with transformers, and prune it with compile_pruned",
        )
    if entry.get("format") != FORMAT:
        raise ArtifactError(
            str(folder / CONFIG),
            "unknown format of a pruned model",
            got=entry.get("format"),
            wanted=FORMAT,
            fix="load it with the tilecut version that wrote it",
        )
    for name in (MODULE, PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(str(folder / name), "file of the pruned model is missing")
    return _open(folder, _source(folder, entry))


def of_artifact(artifact: Artifact) -> Any:
    """An artifact's pruned model; see `Artifact.hf_model`."""
    manifest = artifact.manifest
    if CONFIG not in manifest.files:
        raise ArtifactError(
            str(artifact.path),
            f"{manifest.model} is no model of transformers: the artifact holds no {CONFIG}",
            fix="artifact.module() is the pruned model as a plain nn.Module",
        )
    names = [CONFIG, MODULE, PLAN, WEIGHTS, *(name for name in (GENERATION, ROTATIONS) if name in manifest.files)]
    manifest.check_files(artifact.path, names)
    program, plan = ((artifact.path / name).read_bytes() for name in (MODULE, PLAN))
    seen = manifest.of_module
    source = _make_source(manifest.model, seen.inputs, seen.outputs, program, plan, _rotations(artifact.path))
    return _open(artifact.path, source)


def _make_source(*parts: Any) -> Source:
    _need_transformers()
    from tilecut.pruned_pretrained import Source

    return Source(*parts)


def _need_transformers() -> None:
    try:
        import transformers as _installed
    except ModuleNotFoundError as e:
        raise ArtifactError(
            "tilecut.from_pretrained", "transformers is not installed", fix="pip install 'tilecut[compile]'"
        ) from e
    assert _installed


def _source(folder: Path, entry: dict[str, Any]) -> Source:
    """What the config says of the graph, with the files that it names by hash."""
    program, plan = ((folder / name).read_bytes() for name in (MODULE, PLAN))
    try:
        hashes = {name: str(entry["sha256"][name]) for name in (MODULE, PLAN)}
        inputs, outputs = (
            tuple(TensorSpec(str(s["name"]), str(s["dtype"]), tuple(s["shape"])) for s in entry[side])
            for side in ("inputs", "outputs")
        )
        model = str(entry["model"])
    except (KeyError, TypeError) as e:
        raise ArtifactError(
            str(folder / CONFIG), f"its {ENTRY!r} entry is damaged ({first_line(e)})", fix="save the model again"
        ) from e
    for name, content in ((MODULE, program), (PLAN, plan)):
        if hashlib.sha256(content).hexdigest() != hashes[name]:
            raise ArtifactError(
                str(folder / name),
                f"not the file that {CONFIG} was written with",
                fix="keep the files of one save_pretrained together",
            )
    return _make_source(model, inputs, outputs, program, plan, _rotations(folder))


def _rotations(folder: Path) -> bytes | None:
    path = folder / ROTATIONS
    return path.read_bytes() if path.is_file() else None


def _open(folder: Path, source: Source) -> Any:
    """The model of a source, with the folder's config and weights."""
    import transformers

    from tilecut.pruned_pretrained import pruned_class

    original: Any = getattr(transformers, source.model, None)
    if not (isinstance(original, type) and issubclass(original, transformers.PreTrainedModel)):
        raise ArtifactError(str(folder / CONFIG), "transformers has no such model class", got=source.model)
    config_class: Any = original.config_class
    try:
        PrunePlan.read(folder / PLAN)
    except PlanError as e:
        raise ArtifactError(str(folder / PLAN), f"not a plan ({e})", fix="save the model again") from e
    # A damaged config fails wherever transformers first trips over it.
    try:
        config = config_class.from_pretrained(str(folder))
    except Exception as e:
        raise ArtifactError(str(folder / CONFIG), f"transformers cannot read it: {first_line(e)}") from e
    if hasattr(config, ENTRY):
        delattr(config, ENTRY)
    try:
        program = read_program(folder / MODULE, folder / WEIGHTS)
    except ArtifactError as e:
        if e.where != str(folder / WEIGHTS):
            raise
        raise ArtifactError(
            e.where,
            e.problem.replace("the graph", f"{PLAN} and {MODULE}"),
            got=e.got,
            wanted=e.wanted,
            fix="keep the files of one save_pretrained together",
        ) from e
    model = pruned_class(original)(config, source, program)
    if model.can_generate() and (folder / GENERATION).is_file():
        # An artifact's may ask for a cache.
        use_cache = model.generation_config.use_cache
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
        model.generation_config.use_cache = use_cache
    return model
