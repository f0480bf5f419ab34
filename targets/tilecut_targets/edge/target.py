"""target="edge": one ONNX file that is fast under a plain onnxruntime session with default options."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import onnx

from tilecut_passes.add_cache import AddCache
from tilecut_passes.axes.groups import Group
from tilecut_passes.axes.infer import Axes
from tilecut_passes.calibration import Batch
from tilecut_passes.fuse_rms_norm import FuseRmsNorm
from tilecut_passes.fuse_rotary import FuseRotary
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import Pass
from tilecut_passes.search import Lattice
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.manifest import Manifest, Rung
from tilecut_runtime.reference import Arrays, Case, of_encoder
from tilecut_runtime.session import onnx_runner
from tilecut_targets.check_onnx import check_onnx
from tilecut_targets.cost_model import CostModel
from tilecut_targets.edge.choose_forms import Chosen, choose_forms
from tilecut_targets.edge.contend import contend
from tilecut_targets.edge.describe_emission import describe_emission
from tilecut_targets.edge.forms import Forms, write_forms
from tilecut_targets.edge.gemm_floor import products_runner, write_products
from tilecut_targets.edge.measure_layers import measure_layers
from tilecut_targets.edge.pad_heads import PadHeads
from tilecut_targets.edge.quantize_onnx import CALIBRATED, QUANTIZATIONS, quantize_onnx
from tilecut_targets.target import Contenders, Target, Written, count_attentions

MODEL, ENCODER = "model.onnx", "encoder.onnx"
FUSED_ATTENTION = ("Attention", "MultiHeadAttention", "QAttention", "GroupQueryAttention")
# Part of a transformer -> why it has the form that is emitted.
WHY = {
    "attention": "com.microsoft's fused ops of onnxruntime's CPU provider, or the standard's: one node a layer, QKV packed at "
    "compile time where it can be",
    "norms": "layer norms whole; RMS norms as a division, of which onnxruntime makes one kernel when it loads the file; the "
    "residual before them as Sum: Add would become SkipLayerNormalization, slower on CPUs",
    "rotary": "com.microsoft's op with tables half as wide; in simpler ops where pairs are not seen to share a number",
    "activations": "the bias of the layer before goes into BiasGelu; the others as opset 20 has them",
}


@dataclass(frozen=True)
class EdgeTarget(Target):
    """onnxruntime on a CPU: latency follows MACs, multiples of 16 suffice, any number of heads."""

    name = "edge"
    runtime = "onnxruntime"
    block = 16
    tolerance = 1e-4
    splits = True
    quantizations: ClassVar[Mapping[str, float]] = QUANTIZATIONS
    calibrated: ClassVar[tuple[str, ...]] = CALIBRATED

    chosen: Chosen | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.chip is not None:
            raise ConfigError("target", "the edge target has no chips", got=f"edge:{self.chip}", wanted="'edge'")

    @property
    def fusions(self) -> tuple[Pass, ...]:
        """RMS norms and rotary embeddings, which have forms of their own."""
        return (FuseRmsNorm(), FuseRotary())

    @property
    def before_caching(self) -> tuple[Pass, ...]:
        """Heads whose caches onnxruntime's ops take."""
        return (PadHeads(),)

    def caching(self, max_length: int | None = None) -> tuple[Pass, ...]:
        """A cache for GroupQueryAttention."""
        return (AddCache(max_length),)

    @property
    def forms(self) -> Forms:
        """Those that were chosen, or the first of each kind."""
        return Forms() if self.chosen is None else self.chosen.forms

    @property
    def lowering(self) -> tuple[Pass, ...]:
        """To the forms."""
        return self.forms.passes

    def decided(
        self,
        fused: Graph,
        at: Mapping[str, int],
        measure: bool,
        folder: Path | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> EdgeTarget:
        """With the fastest form of every kind of computation; what is quantized takes the first, which its rewrites know."""
        if self.quantize is not None:
            return self
        return replace(self, chosen=choose_forms(fused, at, measure, folder, progress))

    def write(self, fused: Graph, lowered: Graph, folder: Path) -> Written:
        """model.onnx at the folder's root."""
        write_forms(lowered, folder / MODEL, self.forms)
        forms = {} if self.chosen is None else {"forms": {one.kind: one.as_json() for one in self.chosen.choices}}
        return Written({"model": MODEL}, {"attention": count_attentions(fused), **_facts(folder / MODEL), **forms})

    def write_encoder(self, lowered: Graph, folder: Path) -> Written:
        """encoder.onnx beside model.onnx."""
        write_forms(lowered, folder / ENCODER, self.forms)
        return Written({"encoder": ENCODER}, {"encoder": _facts(folder / ENCODER)})

    def quantize_files(self, folder: Path, batches: Sequence[Batch]) -> dict[str, object]:
        """model.onnx quantized in place, and encoder.onnx where there is one."""
        assert self.quantize is not None
        record = quantize_onnx(folder / MODEL, self.quantize, batches)
        facts: dict[str, object] = {**_facts(folder / MODEL), "quantization": record}
        if (folder / ENCODER).is_file():
            record["encoder"] = quantize_onnx(folder / ENCODER, self.quantize)
            facts["encoder"] = _facts(folder / ENCODER)
        return facts

    def verify(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The ONNX checker, then onnxruntime against the pruned torch model."""
        return self._verify(folder, manifest, "model", cases)

    def verify_encoder(self, folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
        """The same for encoder.onnx."""
        return of_encoder(self._verify(folder, manifest.of_encoder, "encoder", cases))

    def _verify(self, folder: Path, manifest: Manifest, entry: str, cases: Sequence[Case]) -> list[Rung]:
        name = manifest.entry[entry]
        checked = check_onnx(folder, name)
        # A model of gigabytes may be larger than the memory. What is quantized would be computed otherwise than `load` does.
        beside = manifest.quantize is None and (folder / f"{name}.data").is_file()
        run = onnx_runner(folder, manifest, entry, None, lean=beside)
        names = [spec.name for spec in manifest.outputs]
        sizes = ", ".join(case.size for case in cases)
        how = "onnxruntime, weights mapped from their file," if beside else "onnxruntime"
        detail = f"{how} against torch on ragged inputs of {sizes}"
        return [checked, *self.agreement(manifest, cases, lambda inputs: dict(zip(names, run(inputs))), detail)]

    def contenders(self, dense: Graph, folder: Path, manifest: Manifest, threads: int, scratch: Path) -> Contenders:
        """The dense model by this very path, as torch exports it, and after onnxruntime's own transformer optimizer."""
        return contend(self.fusing, self.forms, dense, folder / MODEL, threads, scratch, manifest)

    def floor(self, pruned: Graph, at: Mapping[str, int], scratch: Path) -> Callable[[Arrays], object] | None:
        """The products in float32, whatever the artifact is quantized to."""
        write_products(pruned, at, scratch / "products.onnx")
        return products_runner(scratch / "products.onnx", at.get("threads", 1))

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
    ) -> CostModel:
        """Measured on this machine, one layer of each type at a time; see `measure_layers`."""
        return measure_layers(self, dense, axes, groups, sets, at, lattice, folder, progress)


def _facts(path: Path) -> dict[str, object]:
    counts = count_ops(path)
    return {
        "onnx_nodes": sum(counts.values()),
        "fused_attention": sum(counts[op] for op in FUSED_ATTENTION),
        "onnx_ops": dict(counts.most_common()),
        "emits": describe_emission(counts, WHY),
    }


def count_ops(path: Path) -> collections.Counter[str]:
    """How many nodes of each op an ONNX file holds."""
    return collections.Counter(n.op_type for n in onnx.load(str(path), load_external_data=False).graph.node)
