"""`Artifact`: a compiled folder, seen from where torch is: its plan, report, verification, and the model as a module."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from tilecut_passes.graph import Graph
from tilecut_passes.plan import ROTATIONS, PrunePlan
from tilecut_runtime.errors import ArtifactError, PlanError
from tilecut_runtime.manifest import Manifest, Rung, read_json
from tilecut_runtime.reference import ENCODER, read_cases
from tilecut_runtime.torch_program import WEIGHTS, read_program

PLAN, REPORT, REPORT_PAGE, MODULE = "plan.json", "report.json", "report.html", "module.pt2"


class Artifact:
    """An artifact on disk. Reading it checks that it is one; `verify` checks that it is whole and right."""

    def __init__(self, path: str | Path):
        self.manifest = Manifest.read(path)
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, target={self.manifest.target!r}, model={self.manifest.model!r})"

    @cached_property
    def plan(self) -> PrunePlan:
        """Which units stayed."""
        self.manifest.check_files(self.path, [PLAN, *([ROTATIONS] if ROTATIONS in self.manifest.files else [])])
        try:
            return PrunePlan.read(self.path / PLAN)
        except PlanError as e:
            raise ArtifactError(str(self.path / PLAN), f"not a plan ({e})", fix="compile the model again") from e

    @cached_property
    def report(self) -> dict[str, Any]:
        """What `report.json` says."""
        self.manifest.check_files(self.path, [REPORT])
        held = read_json(self.path / REPORT)
        if not isinstance(held, dict):
            raise ArtifactError(
                str(self.path / REPORT), "not a report", got=type(held).__name__, wanted="a JSON object"
            )
        return held

    def verify(self) -> list[Rung]:
        """Check every file's hash, then run the artifact on its reference inputs.

        Raises:
            ArtifactError: a file is missing, truncated or altered.
        """
        # Targets import their writers; looking at an artifact does not.
        from tilecut_targets.find_target import find_target

        self.manifest.check_files(self.path)
        rungs = [Rung("hashes", "passed", f"{len(self.manifest.files)} files are as the manifest says")]
        target = find_target(self.manifest.target).quantized(self.manifest.quantize)
        rungs += target.verify(self.path, self.manifest, read_cases(self.path, self.manifest))
        if self.manifest.encoder is not None:
            cases = read_cases(self.path, self.manifest.of_encoder, ENCODER)
            rungs += target.verify_encoder(self.path, self.manifest, cases)
        return rungs

    def graph(self) -> Graph:
        """The pruned model as the compiler's graph, before fusion: what passes and exporters take."""
        from tilecut_passes.read_graph import read_graph

        self.manifest.check_files(self.path, [MODULE, WEIGHTS])
        return read_graph(self.path / MODULE, self.path / WEIGHTS, self.manifest.of_module)

    def module(self) -> Any:
        """The pruned model as a trainable `nn.Module` with weights of its own.

        It takes the model's inputs by name or position and returns what the model returned: a tensor, a tuple, or a
        dict whose entries are attributes too. Dropout is not in it: the model was captured in eval mode.
        """
        from tilecut.pruned_module import PrunedModule

        self.manifest.check_files(self.path, [MODULE, WEIGHTS])
        return PrunedModule(read_program(self.path / MODULE, self.path / WEIGHTS), self.manifest.of_module)

    def hf_model(self) -> Any:
        """The pruned model as a `PreTrainedModel` of its original class, for pipelines, `generate` and `Trainer`.

        Its `save_pretrained` writes a folder that `tilecut.from_pretrained` reads. Dropout is not in it.

        Raises:
            ArtifactError: the model was none of transformers, or transformers is not installed.
        """
        from tilecut.pretrained import of_artifact

        return of_artifact(self)

    def write_genai(self, folder: str | Path) -> Path:
        """Write the model as a folder that onnxruntime-genai opens; returns it. Of artifacts compiled with `generate=True`.

        Raises:
            ArtifactError: the artifact has no cache, or one that genai's format cannot hold; the folder is not empty.
        """
        from tilecut.write_genai import write_genai

        return write_genai(self.path, self.manifest, folder)
