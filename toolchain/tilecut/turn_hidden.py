"""Turn the hidden widths of a prepared model to their principal components, and check that it computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tilecut.check_cut import largest_difference
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.find_stream import CannotRotate
from tilecut_passes.rotate_hidden import RotateHidden, principal_basis
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import VerificationError
from tilecut_targets.target import rung

if TYPE_CHECKING:
    from tilecut.prepare import Prepared

# Two products with the basis stand between the graphs, relative to the output's magnitude (float32).
TURN_TOLERANCE = 1e-4
# The share of a stream's energy that the note gives a width for.
MOST_OF_IT = 0.99


def turn_hidden(made: Prepared, progress: Callable[[int, int], None]) -> None:
    """Turn every hidden width that may be cut and can be turned; `made` gets the bases, the graph before, and notes.

    Raises:
        VerificationError: the turned graph gives something else.
        CalibrationError: an activation is not finite; names the layer.
    """
    bases = {}
    for group in made.groups:
        if group.kind != "hidden":
            continue
        try:
            basis, energies = principal_basis(made.dense, group.name, made.fit, progress)
        except CannotRotate as e:
            made.notes.append(f"{group.name}: cut in the model's own channels, since {e}")
            continue
        most = int((energies.cumsum(0) < MOST_OF_IT * energies.sum()).sum()) + 1
        made.turned.append(
            f"{group.name}: turned to its principal components, of which {most} of {group.size} hold {MOST_OF_IT:.0%} of "
            "what its layers read"
        )
        bases[group.name] = basis
    if not bases:
        return
    straight, turned = made.dense, made.dense.copy()
    run_passes(turned, [RotateHidden(bases)])
    worst = largest_difference(straight, straight, turned)
    if not worst <= TURN_TOLERANCE:
        exact = largest_difference(straight, straight.in_double(), turned.in_double(), dtype=torch.float64)
        if not exact <= TURN_TOLERANCE:
            raise VerificationError(
                "rotate",
                "the model gives something else with its hidden width turned",
                got=f"relative error {exact:.2e} in float64",
                wanted=f"at most {TURN_TOLERANCE:.0e}",
                fix="rotate=False; and please report the model: an op rule is wrong",
            )
        made.turned.clear()
        made.notes.append(f"hidden width cut in the model's own channels: turned, float32 would round by {worst:.0e}")
        return
    made.straight, made.rotations = replace(made), bases
    made.notes += made.turned
    made.rungs.append(rung("turned equals dense", worst, TURN_TOLERANCE, "random inputs at two shapes"))
    made.dense, made.axes = turned, infer(turned)
    # A head that got a tensor of its own makes a group larger by it.
    every, kinds = find_groups(made.axes), {g.kind for g in made.groups}
    made.groups = [g for g in every if g.kind in kinds]
    if made.words is not None:
        words = set(made.words.group.members)
        made.words = replace(made.words, group=next(g for g in every if words <= set(g.members)))
