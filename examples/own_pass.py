"""A pass of your own: swap the exact GELU for its tanh form, and compile with it.

A pass is a frozen dataclass. `match` says what it found, or why not; calling it rewrites the graph and counts.
Run it:  python examples/own_pass.py
"""

from dataclasses import dataclass

import torch
from torch import fx, nn

from tilecut import PruneConfig, compile_pruned, load
from tilecut_passes.graph import Graph, Refusal, arguments, is_call

GELU = torch.ops.aten.gelu.default


@dataclass(frozen=True)
class ApproximateGelu:
    """Before: gelu(x). After: gelu(x, approximate="tanh"). Left alone: a GELU in another dtype than float32."""

    def match(self, node: fx.Node) -> str | None:
        dtype = node.meta["val"].dtype
        return None if dtype == torch.float32 else f"its dtype is {dtype}, wanted torch.float32"

    def __call__(self, graph: Graph) -> int:
        count = 0
        for node in graph.nodes:
            if not is_call(node, GELU) or arguments(node)["approximate"] == "tanh":
                continue
            if reason := self.match(node):
                graph.refusals.append(Refusal("ApproximateGelu", node.name, reason))
                continue
            node.kwargs = {"approximate": "tanh"}
            count += 1
        return count


if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10)).eval()
    calibration = [{"input": torch.randn(128, 64)} for _ in range(8)]
    artifact = compile_pruned(
        model,
        example_inputs=torch.randn(2, 64),
        calibration=calibration,
        config=PruneConfig(sparsity=0.25),
        passes=(ApproximateGelu(),),
        output="own-pass",
    )
    print([p for p in artifact.report["passes"] if p["name"] == "ApproximateGelu"])
    print({name: y.shape for name, y in load(artifact.path).run({"input": calibration[0]["input"].numpy()}).items()})
