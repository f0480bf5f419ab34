"""The dense and the pruned graph side by side on one batch, from one layer to the next: what layers are fitted to.

The pruned run makes the dense one's choices (`find_choices`), so that both see the same rows at every layer.
"""

from __future__ import annotations

from torch import Tensor

from tilecut_passes.axes.selection import take
from tilecut_passes.calibration import Batch
from tilecut_passes.disk_tensor import WaitingTensors
from tilecut_passes.refit_sites import Site
from tilecut_passes.step_graph import Schedule, Stepper


class TwinRun:
    """Both graphs on one batch."""

    def __init__(self, dense: Schedule, pruned: Schedule, batch: Batch):
        self.dense, self.pruned = Stepper(dense, batch), Stepper(pruned, batch)

    def run_to(self, name: str, inclusive: bool) -> None:
        """Run both up to a node; the dense one past it where inclusive."""
        self.dense.run_to(name, inclusive)
        self.pruned.run_to(name, False, self.dense.choices)
        self.dense.choices.clear()

    def target(self, site: Site) -> Tensor:
        """What the layer should give: its output in the dense graph, less what the residual stream has moved by."""
        output = self.dense.read(self.dense.node(site.node))
        target = _staying(site, output)
        for name, before in zip(site.residuals, site.were, strict=True):
            was = _staying(site, self.dense.read(self.dense.node(before)).reshape(output.shape))
            target = target - (self.pruned.read(self.pruned.node(name)).reshape(target.shape) - was)
        return target

    def wait(self, waiting: WaitingTensors, owned: set[int]) -> None:
        """Put away what both keep until the next layer; storages in `owned`, and the batch's own, stay."""
        owned = owned | {x.untyped_storage().data_ptr() for x in self.dense.batch.inputs.values()}
        self.dense.wait(waiting, owned)
        self.pruned.wait(waiting, owned)


def _staying(site: Site, value: Tensor) -> Tensor:
    """The units of an output of the layer that stay."""
    return value if site.outputs is None else take(value, value.ndim + site.channel, site.outputs)
