"""Whether a graph that removes tokens gives what one gives that hides them, on random ragged inputs at two shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilecut.check_cut import CUT_TOLERANCE, largest_difference
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph
from tilecut_passes.mask_tokens import MaskTokens
from tilecut_passes.run_passes import run_passes
from tilecut_passes.token_plan import TokenPlan
from tilecut_runtime.errors import VerificationError
from tilecut_runtime.manifest import Rung
from tilecut_targets.target import rung

# Of the random inputs: others than those of the cut.
SEED = 200


def check_token_cut(whole: Graph, cut: Graph, tokens: Sequence[TokenPlan]) -> Rung:
    """Compare the two interpretations of a plan's tokens; `whole` is the graph that `cut` was made from.

    Raises:
        VerificationError: they differ.
    """
    masked = whole.copy()
    run_passes(masked, [FuseAttention(), MaskTokens(tuple(tokens))])
    detail = "at full length with removed tokens hidden, random ragged inputs at two shapes"
    worst = largest_difference(whole, masked, cut, seed=SEED)
    if not worst <= CUT_TOLERANCE:
        # Rounding may swap two tokens that are looked at almost alike.
        detail += f"; in float64, since float32 differs by {worst:.0e} in this model"
        worst = largest_difference(whole, masked.in_double(), cut.in_double(), dtype=torch.float64, seed=SEED)
    if not worst <= CUT_TOLERANCE:
        raise VerificationError(
            "tokens",
            "the graph that removes tokens differs from the one that hides them",
            got=f"relative error {worst:.2e}",
            wanted=f"at most {CUT_TOLERANCE:.0e}",
            fix="please report the model: it mixes tokens in a way that is not seen",
        )
    return rung("tokens: cut equals masked", worst, CUT_TOLERANCE, detail)
