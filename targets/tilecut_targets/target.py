"""What a target is: the shapes it likes, the passes that lower to it, how its artifact is written, and how checked.

To add one: subclass `Target` in a package of its own and add a line to `TARGETS` in `find_target.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from tilecut_passes.add_cache import CACHED_ATTENTION
from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.calibration import Batch
from tilecut_passes.enforce_block_multiple import EnforceBlockMultiple
from tilecut_passes.enforce_head_width import EnforceHeadWidth
from tilecut_passes.enforce_power_of_two_heads import EnforcePowerOfTwoHeads
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import PACKED_ATTENTION, Graph, is_call
from tilecut_passes.legalize_groups import LegalizeGroups
from tilecut_passes.run_passes import Pass
from tilecut_passes.search import Lattice
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.manifest import DimRange, Manifest, Rung
from tilecut_runtime.reference import Arrays, Case, agreement_rungs
from tilecut_targets.cost_model import CostModel


@dataclass
class Written:
    """What `Target.write` put into the folder: the manifest's entries, and facts for the report."""

    entry: dict[str, str]
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Contenders:
    """What is timed side by side: runners by name, and those that could not be made, with the reason."""

    runners: dict[str, Callable[[Arrays], object]]
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target(ABC):
    """One kind of device. `chip` narrows it down where the target has several; `quantize` is a word of `quantizations`."""

    chip: str | None = None
    quantize: str | None = field(default=None, kw_only=True)

    # Set by subclasses.
    name = ""
    runtime = ""
    block = 1
    head_width = 1
    power_of_two_heads = False
    # Whether packed segments become sequences of `tilecut::attention_varlen`, or stay a mask.
    packed = False
    # Whether the artifact is what torch.export writes, to which sizes of 1 are constants.
    exported = False
    # Whether an encoder-decoder that generates is written as two models.
    splits = False
    # What can be done to the written files after everything else, with how far the outputs may then differ, in norm; and
    # which of it needs calibration data.
    quantizations: ClassVar[Mapping[str, float]] = {}
    calibrated: ClassVar[tuple[str, ...]] = ()
    # How far an artifact may differ from the pruned torch model, relative to the output's magnitude.
    tolerance = 1e-4

    @property
    def rounds(self) -> bool:
        """Whether the lowered graph computes in 16 bits, so that its numbers are to be checked on real data."""
        return False

    @property
    def fusions(self) -> tuple[Pass, ...]:
        """Passes that run after attention is fused, for what else the target has ops for."""
        return ()

    def quantized(self, how: str | None) -> Target:
        """The target with files quantized as `how` says; None leaves it as it is.

        Raises:
            ConfigError: the target cannot do that.
        """
        how = self.quantize if how is None else how
        if how is None:
            return self
        if how not in self.quantizations:
            raise ConfigError(
                "quantize",
                f"the {self} target has no such quantization",
                got=repr(how),
                wanted=" or ".join(map(repr, (*self.quantizations, None))),
            )
        return replace(self, quantize=how)

    @property
    def limit(self) -> float:
        """How far the artifact may differ from the pruned torch model: `tolerance`, or what the quantization may lose."""
        return self.tolerance if self.quantize is None else self.quantizations[self.quantize]

    @property
    def needs_data(self) -> bool:
        """Whether `quantize_files` needs calibration data."""
        return self.quantize in self.calibrated

    def lattice(self, block: int | None = None, power_of_two_heads: bool | None = None) -> Lattice:
        """The sizes that search may choose; the caller's block is combined with the target's by least common multiple."""
        both = math.lcm(self.block, block or 1)
        powers = self.power_of_two_heads if power_of_two_heads is None else power_of_two_heads
        return Lattice(
            {"heads": 1, "kv_groups": 1, "queries": 1, "neurons": both, "hidden": both},
            frozenset({"heads", "kv_groups", "queries"} if powers else ()),
            padded={"neurons": self.block},
        )

    def emitted_sizes(self, lattice: Lattice, group: Group) -> list[int]:
        """What a group may have after padding, under the target's own lattice and another one."""
        both = (self.lattice(), lattice)
        return sorted({one.emitted(group.kind, n) for one in both for n in one.sizes(group.kind, group.size)})

    def ranges(self, graph: Graph, at: Mapping[str, int]) -> dict[str, DimRange]:
        """The sizes that an artifact takes: those of the model, or fewer where the runtime fixes or bounds them.

        Args:
            at: batch and sequence, or sizes by their names, that it is to serve at least.
        """
        return dict(graph.ranges)

    def enforce(self, power_of_two_heads: bool | None = None) -> tuple[LegalizeGroups, ...]:
        """Passes that bring any graph or plan to shapes that the target takes; they rewrite nothing that search chose."""
        powers = self.power_of_two_heads if power_of_two_heads is None else power_of_two_heads
        heads = (EnforcePowerOfTwoHeads(),) if powers else ()
        return (EnforceHeadWidth(multiple=self.head_width), *heads, EnforceBlockMultiple(block=self.block))

    def decided(
        self,
        fused: Graph,
        at: Mapping[str, int],
        measure: bool,
        folder: Path | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Target:
        """The target with what depends on the model decided, by measurement where `measure` allows it; itself by default.

        Args:
            fused: what `lowering` will start from; left as it is.
            at: batch, sequence and threads of the run that is to be fast.
            folder: where measurements are kept; None keeps none.
            progress: told of steps done and steps in all.
        """
        return self

    @property
    def fusing(self) -> tuple[Pass, ...]:
        """All passes from a legal graph to the fused one that `lowering` starts from."""
        return (FuseAttention(self.packed), *self.fusions)

    @property
    def before_caching(self) -> tuple[Pass, ...]:
        """Passes over the fused graph of a model that generates, before its encoder, if it has one, is split off."""
        return ()

    def caching(self, max_length: int | None = None) -> tuple[Pass, ...]:
        """Passes from the fused graph of a decoder to one that goes on from a key-value cache of `max_length` places at most.

        Raises:
            ConfigError: the target has no such models.
        """
        raise ConfigError("generate", "the target writes no models that generate", got=str(self), wanted="edge")

    @property
    @abstractmethod
    def lowering(self) -> tuple[Pass, ...]:
        """Passes from the fused graph to what `write` can express."""

    @abstractmethod
    def write(self, fused: Graph, lowered: Graph, folder: Path) -> Written:
        """Write the model's files into `folder`."""

    def write_encoder(self, lowered: Graph, folder: Path) -> Written:
        """Write the encoder of an encoder-decoder that generates, beside what `write` wrote."""
        raise NotImplementedError(f"{self.name} has no models that generate")

    def quantize_files(self, folder: Path, batches: Sequence[Batch]) -> dict[str, object]:
        """Quantize what `write` wrote, as `quantize` says; returns facts for the report, the record as "quantization".

        Args:
            batches: calibration of the model that was written; [] where there is none.
        """
        raise NotImplementedError(f"{self.name} has no quantizations")

    @abstractmethod
    def verify(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """Climb the verification ladder; `cases` come from the pruned torch model."""

    def verify_encoder(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The same for what `write_encoder` wrote."""
        raise NotImplementedError(f"{self.name} has no models that generate")

    def agreement(
        self, manifest: Manifest, cases: Sequence[Case], run: Callable[[Arrays], Mapping[str, np.ndarray]], detail: str
    ) -> list[Rung]:
        """The rungs on which the written files meet the pruned torch model's outputs."""
        quantized = manifest.quantize is not None
        limit = manifest.tolerance if quantized else self.tolerance
        return agreement_rungs("artifact equals pruned model", cases, run, limit, detail, quantized)

    def contenders(
        self, dense: Graph, folder: Path, manifest: Manifest, threads: int, scratch: Path
    ) -> Contenders | None:
        """The artifact ("pruned artifact") and forms of the dense model to time it against; None where none can run here."""
        return None

    def floor(self, pruned: Graph, at: Mapping[str, int], scratch: Path) -> Callable[[Arrays], object] | None:
        """A runner of the model's matrix products and nothing else in the target's runtime, for the floor of its latency.

        None where that runtime is not here. `at` are batch, sequence and threads; files go to `scratch`.
        """
        return None

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
        """What a run of the model costs as a function of its groups' sizes; None where the target cannot say.

        Args:
            dense: the captured model, typed by `axes`; left as it is.
            groups: the groups that may be cut.
            sets: their names, split so that sets share no contraction.
            at: batch, sequence and threads of the run.
            lattice: the sizes that will be asked for, after padding.
            folder: where measurements are kept; None keeps none.
            progress: told of steps done and steps in all.
        """
        return None

    def __str__(self) -> str:
        return f"{self.name}:{self.chip}" if self.chip else self.name


def count_attentions(graph: Graph) -> int:
    """How many attentions a fused graph has, dense, packed and with a cache."""
    return sum(is_call(n, torch.ops.tilecut.attention.default, PACKED_ATTENTION, CACHED_ATTENTION) for n in graph.nodes)


def rung(name: str, figure: float, limit: float, detail: str) -> Rung:
    """A rung that passes when the figure does not exceed the limit."""
    return Rung(name, "passed" if figure <= limit else "failed", detail, float(figure), float(limit))
