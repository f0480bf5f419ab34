"""Whether a graph that removes tokens gives what one gives that hides them, on random ragged inputs at two shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilecut.check_cut import CUT_SHAPES, CUT_TOLERANCE
from tilecut.make_cases import make_inputs
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph
from tilecut_passes.mask_tokens import MaskTokens
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_passes.token_plan import TokenPlan
from tilecut_runtime.errors import VerificationError
from tilecut_runtime.manifest import Rung
from tilecut_targets.target import rung


def check_token_cut(whole: Graph, cut: Graph, tokens: Sequence[TokenPlan]) -> Rung:
    """Compare the two interpretations of a plan's tokens; `whole` is the graph that `cut` was made from.

    Raises:
        VerificationError: they differ.
    """
    masked = whole.copy()
    run_passes(masked, [FuseAttention(), MaskTokens(tuple(tokens))])
    detail = "at full length with removed tokens hidden, random ragged inputs at two shapes"
    worst = _difference(whole, masked, cut)
    if not worst <= CUT_TOLERANCE:
        # Rounding may swap two tokens that are looked at almost alike.
        detail += f"; in float64, since float32 differs by {worst:.0e} in this model"
        worst = _difference(whole, masked.in_double(), cut.in_double(), torch.float64)
    if not worst <= CUT_TOLERANCE:
        raise VerificationError(
            "tokens",
            "the graph that removes tokens differs from the one that hides them",
            got=f"relative error {worst:.2e}",
            wanted=f"at most {CUT_TOLERANCE:.0e}",
            fix="please report the model: it mixes tokens in a way that is not seen",
        )
    return rung("tokens: cut equals masked", worst, CUT_TOLERANCE, detail)


def _difference(whole: Graph, masked: Graph, cut: Graph, dtype: torch.dtype | None = None) -> float:
    worst = 0.0
    for i, (batch, length) in enumerate(CUT_SHAPES):
        inputs = make_inputs(whole, batch, length, seed=200 + i)
        inputs = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in inputs.items()}
        worst = max(worst, largest_error(masked.run(inputs), cut.run(inputs)))
    return worst
