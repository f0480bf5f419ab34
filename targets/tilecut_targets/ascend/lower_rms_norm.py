"""Lower `aten.rms_norm` to CANN's RmsNorm where the chip's row of the legality table allows it.

Before: aten.rms_norm(x, [H], weight, eps). After, in x's type: npu::NPURmsNorm for the ONNX file, the first result of
torch.ops.npu.npu_rms_norm for the program of torch_npu and the GE model; without a weight, of ones.
Left alone, to be written out by whoever exports; once for each reason in `graph.refusals`: what `legal_norms.choose_norm`
says, norms over several dimensions, weights of another type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilecut_passes.graph import Graph, Refusal, arguments, calls_before, is_call, value_of
from tilecut_runtime.npu_norms import RMS_NORM
from tilecut_targets.ascend import npu_norms
from tilecut_targets.ascend.legal_norms import choose_norm
from tilecut_targets.ascend.legality import Refused
from tilecut_targets.decompose_norms import default_eps


@dataclass(frozen=True)
class LowerRmsNorm:
    """Every norm within the limits of a family of chips becomes one op of a container, "onnx" or "air"."""

    family: str = "a2"
    container: str = "onnx"

    def match(self, node: fx.Node) -> str | Refused:
        """The op, or the limit that the norm breaks."""
        a, x = arguments(node), value_of(node)
        if len(a["normalized_shape"]) != 1:
            dims = f"{len(a['normalized_shape'])} dimensions"
            return Refused("a fused norm runs over the last dimension", dims, "written out it is exact")
        if a["weight"] is not None and value_of(a["weight"]).dtype != value_of(a["input"]).dtype:
            types = f"x {value_of(a['input']).dtype}, weight {value_of(a['weight']).dtype}"
            return Refused("a fused norm has a weight of its own type", types, "written out it is exact")
        dtype = str(x.dtype).removeprefix("torch.")
        return choose_norm(self.family, self.container, dtype, int(a["normalized_shape"][0]), eps_of(node))

    def __call__(self, graph: Graph) -> int:
        """Lower in place; returns the number of norms."""
        count = 0
        refused: dict[str, list[str]] = {}
        for node in [n for n in graph.nodes if is_call(n, torch.ops.aten.rms_norm.default)]:
            found = self.match(node)
            if isinstance(found, Refused):
                refused.setdefault(str(found), []).append(node.name)
                continue
            a = arguments(node)
            op = npu_norms.rms_norm if self.container == "onnx" else fused_rms_norm
            with calls_before(graph, node) as call:
                node.replace_all_uses_with(call(op, a["input"], a["weight"], eps_of(node)))
            graph.fx.erase_node(node)
            count += 1
        graph.refusals += refusals("LowerRmsNorm", refused)
        return count


def refusals(by: str, found: Mapping[str, list[str]]) -> list[Refusal]:
    """One refusal for each reason: a deep model has hundreds of norms, and one or two reasons."""
    more = lambda names: f" ({len(names) - 1} more like it)" if len(names) > 1 else ""
    return [Refusal(by, names[0], why + more(names)) for why, names in found.items()]


def eps_of(norm: fx.Node) -> float:
    """The epsilon of an aten.rms_norm, torch's own where it names none."""
    a = arguments(norm)
    return default_eps(value_of(a["input"]).dtype) if a["eps"] is None else float(a["eps"])


def fused_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """torch_npu's norm of x [.., H]."""
    return RMS_NORM(x, x.new_ones(x.shape[-1]) if weight is None else weight, eps)[0]
