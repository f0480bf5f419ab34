"""Many budgets of one model from one table, then an artifact of the knee.

Run it:  python examples/explore_budgets.py
"""

import torch
import transformers

from tilecut import PruneConfig, compile_pruned
from tilecut.explore import explore

if __name__ == "__main__":
    shape = transformers.DistilBertConfig(vocab_size=500, dim=64, n_layers=1, n_heads=4, hidden_dim=256)
    model = transformers.DistilBertModel(shape).eval()
    # Data of your own go here: batches, texts with a tokenizer, a file.
    batches = [{"input_ids": torch.randint(0, 500, (24, 16)), "attention_mask": torch.ones(24, 16).long()} for _ in range(10)]

    # For cuda the front is drawn against milliseconds that are calculated; for edge, against measured ones.
    at = {"sequence": 16}
    found = explore(
        model, "cuda", calibration=batches, config=PruneConfig(at=at), output="front", sparsities=(0.3, 0.5, 0.7, 0.99)
    )
    print(found.report["title"])
    for name, point in found.points.items():
        print(f"{name:14}", point["why"] or f"{point['quality']:.6f} at {point['macs']:,} MACs")
    print("front:", *found.front, "knee:", found.knee)

    # The table is kept: this compile measures nothing again.
    sparsity = found.points[found.knee or "sparsity-0.5"]["budget"]["sparsity"]
    config = PruneConfig(sparsity=sparsity, at=at)
    artifact = compile_pruned(model, "cuda", calibration=batches, config=config, output="chosen", measure=False)
    print("rows of the table measured again:", artifact.report["table"]["measured"])
