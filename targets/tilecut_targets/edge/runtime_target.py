"""What the targets behind "edge:" share: the shapes they like, how their files are verified, timed and reported.

A runtime adds its lowering, `emit` (the files), `open_model` (a written model as its users open it) and the reasons for
its forms. Everything else follows from these: the dense model that an artifact is timed against takes the same path, and
the cost model times layers in the runtime that will run them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass, run_passes
from tilecut_passes.search import Lattice
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.manifest import Manifest, Rung
from tilecut_runtime.reference import Arrays, Case, decoding_rung
from tilecut_runtime.session import RUNTIMES, Session
from tilecut_runtime.timing import PRUNED
from tilecut_targets.cost_model import CostModel
from tilecut_targets.edge.contend import DENSE, EXPORTED, prefilling
from tilecut_targets.edge.describe_emission import describe_emission
from tilecut_targets.edge.measure_layers import measure_layers
from tilecut_targets.target import Contenders, Target, Written, count_attentions
from tilecut_targets.unpack_attention import UnpackAttention


@dataclass(frozen=True)
class RuntimeTarget(Target):
    """A runtime on a CPU other than onnxruntime's own form: latency follows MACs, multiples of 16 suffice."""

    name = "edge"
    block = 16
    tolerance = 1e-4
    # The word behind "edge:", and part of a transformer -> why it has the form that is emitted.
    word: ClassVar[str] = ""
    why: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        if self.chip != self.word:
            raise ConfigError("target", "the runtime has no chips", got=f"edge:{self.chip}", wanted=f"edge:{self.word}")

    @property
    @abstractmethod
    def version(self) -> str:
        """The runtime and its version, for what was measured with it."""

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """Nothing is fused: `emit` writes attention as MatMul and Softmax."""
        return (UnpackAttention(),)

    @abstractmethod
    def emit(self, lowered: Graph, folder: Path) -> tuple[dict[str, str], dict[str, int]]:
        """Write the files; returns the manifest's entries, and how many nodes of each op the model holds."""

    @abstractmethod
    def open_model(self, path: Path, threads: int) -> Callable[[Arrays], object]:
        """A runner over a written model, as a user of the runtime opens it."""

    @abstractmethod
    def check(self, folder: Path) -> Rung:
        """Whether the file is of its format at all.

        Raises:
            ArtifactError: the file is missing, damaged or not of its format.
        """

    def write(self, fused: Graph, lowered: Graph, folder: Path) -> Written:
        """The runtime's files, and facts about them."""
        entry, counts = self.emit(lowered, folder)
        facts = {
            "runtime": self.version,
            "attention": count_attentions(fused),
            "sizes": {name: [limits.min, limits.max] for name, limits in lowered.ranges.items()},
            **self.facts(counts),
            "cost_model": f"measured in {self.version}",
        }
        return Written(entry, facts)

    def facts(self, counts: Mapping[str, int]) -> dict[str, object]:
        """What a report says of a model that holds so many nodes of each op."""
        return {
            "nodes": sum(counts.values()),
            "ops": dict(sorted(counts.items(), key=lambda item: -item[1])),
            "emits": describe_emission(counts, self.why),
        }

    def verify(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The format's own checker, then the runtime against the pruned torch model."""
        checked = self.check(folder)
        # The session that `load` opens.
        session: Session = RUNTIMES[self.runtime](folder, manifest, None, None)
        sizes = ", ".join(case.size for case in cases)
        detail = f"{session.how} against torch on ragged inputs of {sizes}"
        rungs = [checked, *self.agreement(manifest, cases, session.run, detail)]
        if manifest.generation is not None:
            rungs.append(decoding_rung(session, cases, manifest.tolerance))
        return rungs

    def contenders(
        self, dense: Graph, folder: Path, manifest: Manifest, threads: int, scratch: Path
    ) -> Contenders | None:
        """The dense model by this very path, and as torch exports it, without our fusions, in the same runtime."""
        fused = dense.copy()
        fused.ranges = dict(manifest.dims)
        exported = fused.copy()
        run_passes(fused, [*self.fusing, *self.lowering])
        # Attention stays as the model spells it.
        run_passes(exported, [UnpackAttention()])
        pruned = self.open_model(folder / manifest.entry["model"], threads)
        runners = {PRUNED: pruned if manifest.generation is None else prefilling(manifest, pruned)}
        for name, graph in ((DENSE, fused), (EXPORTED, exported)):
            place = scratch / str(len(runners))
            place.mkdir()
            entry, _ = replace(self, quantize=None).emit(graph, place)
            runners[name] = self.open_model(place / entry["model"], threads)
        return Contenders(runners)

    def cost(
        self,
        dense: Graph,
        axes: Axes,
        groups: Sequence[Group],
        sets: Sequence[Sequence[str]],
        at: Mapping[str, int],
        lattice: Lattice,
        folder: Path | None,
        progress: Callable[[int, int], None],
    ) -> CostModel | None:
        """Measured on this machine in the runtime itself; see `measure_layers`."""
        return measure_layers(
            self, dense, axes, groups, sets, at, lattice, folder, progress, self.open_model, self.version
        )
