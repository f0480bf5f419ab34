"""What lowering does to numbers, on real data: in 16 bits what is too large becomes infinite, and random inputs hide it."""

from __future__ import annotations

from collections.abc import Sequence

from tilecut.make_cases import make_case
from tilecut_passes.calibration import Batch
from tilecut_passes.graph import Graph
from tilecut_runtime.manifest import Rung
from tilecut_targets.target import rung

# Of the held-out ones.
BATCHES = 4


def check_lowered(pruned: Graph, lowered: Graph, batches: Sequence[Batch], tolerance: float) -> Rung:
    """The lowered graph in torch against the pruned one, on held-out calibration data."""
    worst = 0.0
    for batch in batches[:BATCHES]:
        inputs = {name: batch.inputs[name] for name in pruned.inputs}
        case = make_case(inputs, pruned.run(inputs), pruned.hiding)
        worst = max(worst, case.error({k: v.numpy() for k, v in lowered.run(inputs).items()}))
    return rung("16 bits on real data", worst, tolerance, "the lowered program in torch, on held-out calibration data")
