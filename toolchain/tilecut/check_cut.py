"""The central check: the cut graph gives what the dense one gives with 0/1 masks at its gates, on random ragged inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from tilecut.make_cases import make_inputs
from tilecut_passes.graph import Graph
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import as_cut
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import CaptureError, VerificationError
from tilecut_runtime.manifest import Rung
from tilecut_targets.target import rung

log = logging.getLogger("tilecut.check_cut")

# How far the cut graph may differ from the masked dense one, relative to the output's magnitude (float32).
CUT_TOLERANCE = 1e-5
CUT_SHAPES = ((2, 9), (3, 37))


def check_cut(dense: Graph, pruned: Graph, plan: PrunePlan) -> Rung:
    """Compare the two interpretations of a plan.

    Raises:
        VerificationError: they differ: an op rule is wrong.
        CaptureError: the dense model itself gives nothing finite.
    """
    masked = dense.copy()
    run_passes(masked, [Mask(plan)])
    detail = "before reconstruction, random inputs at two shapes"
    cut = as_cut(dense, plan)
    worst = largest_difference(dense, masked, pruned, cut)
    if not worst <= CUT_TOLERANCE:
        # Weights far from what training leaves make float32 itself differ by more: then float64 tells.
        detail += f"; in float64, since float32 rounds to {worst:.0e} in this model"
        try:
            worst = largest_difference(dense, masked.in_double(), pruned.in_double(), cut, torch.float64)
        except RuntimeError as e:
            # A cast inside the model keeps some of it in float32.
            log.debug("cannot compare in float64: %s", e)
    if not worst <= CUT_TOLERANCE:
        inputs = make_inputs(dense, *CUT_SHAPES[0], seed=100)
        if odd := [n for n, x in dense.run(inputs).items() if x.is_floating_point() and not x.isfinite().any()]:
            raise CaptureError(
                dense.module._get_name(),
                f"the model itself gives no finite {odd[0]} on random inputs",
                fix="look for NaN or infinity in its weights and statistics",
            )
        raise VerificationError(
            "prune",
            "the cut graph differs from the masked dense one",
            got=f"relative error {worst:.2e}",
            wanted=f"at most {CUT_TOLERANCE:.0e}",
            fix="please report the model: an op rule is wrong",
        )
    return rung("cut equals masked dense", worst, CUT_TOLERANCE, detail)


def largest_difference(
    dense: Graph,
    masked: Graph,
    pruned: Graph,
    cut: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
    dtype: torch.dtype | None = None,
    seed: int = 100,
) -> float:
    """How far two graphs' outputs are apart on random ragged inputs of `dense`, in `dtype`, at the shapes of the check.

    `cut` makes inputs and outputs of the masked graph those of the pruned one.
    """
    worst = 0.0
    for i, (batch, length) in enumerate(CUT_SHAPES):
        inputs = make_inputs(dense, batch, length, seed=seed + i)
        inputs = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in inputs.items()}
        worst = max(worst, largest_error(cut(masked.run(inputs)), pruned.run(cut(inputs))))
    return worst
