"""What quantization costs in accuracy: the written files, run as they will be, beside the model that they were made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilecut.measure_fidelity import measure_fidelity
from tilecut.prepare import Prepared
from tilecut.whole_texts import WholeTexts
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import as_cut
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.session import RUNTIMES, Session


class _Artifact:
    """A session as a model that is measured: tensors in, tensors out."""

    def __init__(self, session: Session):
        self.session = session

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {spec.name: inputs[spec.name].numpy() for spec in self.session.inputs}
        return {name: torch.from_numpy(value) for name, value in self.session.run(arrays).items()}


def measure_quantized(
    made: Prepared, pruned: Graph, plan: PrunePlan, folder: Path, manifest: Manifest
) -> dict[str, dict[str, Any]]:
    """Fidelity of the quantized artifact, to the pruned model in float32 and to the dense one, on the batches held out."""
    assert made.calibrated is not None
    session = RUNTIMES[manifest.runtime](folder, manifest, None, None)
    artifact = _Artifact(session) if manifest.generation is None else WholeTexts(session)
    cut = as_cut(made.dense, plan)
    held_out, general = made.calibrated.held_out, made.calibrated.general

    def as_pruned(batch: Batch) -> Batch:
        return replace(batch, inputs=cut(batch.inputs))

    return {
        "to_pruned": measure_fidelity(
            pruned, artifact, [as_pruned(b) for b in held_out], general=[as_pruned(b) for b in general]
        ),
        "to_dense": measure_fidelity(made.dense, artifact, held_out, cut, general),
    }
