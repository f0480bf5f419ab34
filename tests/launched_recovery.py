"""Calibration, repair and recovery of a tiny model, as one process or as several: run by `test_recover.py`.

python tests/launched_recovery.py FOLDER, or accelerate launch --multi_gpu --num_processes 2 tests/launched_recovery.py FOLDER
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tilecut.join_processes import join_processes
from tilecut.recover import recover
from tilecut.recovery_config import Recovery
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.reconstruct import Reconstruct
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import score
from tilecut_passes.share_batches import process

# Steps of one batch are shared by rows; steps of two by batches, but for the odd one at an epoch's end.
SETTINGS = {
    "rows": Recovery(epochs=2, learning_rate=5e-3),
    "batches": Recovery(epochs=2, learning_rate=5e-3, accumulate=2, labels="task"),
}


class Block(nn.Module):
    """Attention of 4 heads and 24 neurons, without biases that a softmax ignores: their gradient is rounding alone."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.up, self.down, self.norm = nn.Linear(32, 24), nn.Linear(24, 32), nn.LayerNorm(32)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).reshape(b, s, -1)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Two blocks, and a class of three for each text."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(50, 32), nn.ModuleList([Block(), Block()]), nn.Linear(32, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask[:, None, None, :] != 0)
        return {"logits": self.head(x[:, 0]), "hidden": x}


def made(count: int, rows: int = 6, length: int = 9) -> tuple[Graph, list[Batch]]:
    """The dense model, and batches of ragged texts with labels."""
    torch.manual_seed(0)
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    dense = capture(Classifier().eval(), example)
    batches = []
    for _ in range(count):
        lengths = torch.randint(1, length + 1, (rows, 1))
        ids, mask = torch.randint(0, 50, (rows, length)), (torch.arange(length)[None] < lengths).long()
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 3, (rows,))})
    return dense, check_batches(dense, batches)


def half(dense: Graph, importance: str, batches: list[Batch]) -> Graph:
    """The dense model with the best half of every group, repaired."""
    groups = [g for g in find_groups(infer(dense)) if g.kind in ("heads", "neurons")]
    rankings = score(importance, dense, groups, batches, 0)
    plan = PrunePlan.keep_all(dense, groups).keeping({g.name: rankings[g.name].best(g.size // 2) for g in groups})
    cut = dense.copy()
    run_passes(cut, [Prune(plan), Reconstruct(dense, batches)])
    return cut


def run(folder: Path) -> None:
    """Write the weights after every stage; the main process alone writes."""
    join_processes(cpu=True)
    dense, batches = made(8)
    fit, held_out = batches[:5], batches[5:]
    held: dict[str, torch.Tensor] = {"processes": torch.tensor(process()[1])}
    for importance in ("obs", "fisher"):
        cut = half(dense, importance, fit)
        held |= {f"{importance}.{name}": t.detach().clone() for name, t in cut.tensors.items()}
    start = half(dense, "obs", fit)
    for name, config in SETTINGS.items():
        cut = start.copy()
        report = recover(dense, cut, fit, held_out, config, seed=3)
        held |= {f"{name}.{k}": t.detach().clone() for k, t in cut.tensors.items()}
        held[f"{name}.losses"] = torch.tensor([*report.held_out_loss, *report.training_loss])
    if process()[0] == 0:
        save_file(held, folder / "weights.safetensors")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
