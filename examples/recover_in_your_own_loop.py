"""Train a pruned model in a loop of your own, then compile the trained model without cutting it again.

python examples/recover_in_your_own_loop.py
"""

import torch
import transformers

from tilecut import PruneConfig, compile_pruned

torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=500,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=64,
    initializer_range=0.3,  # random, but large enough that every unit counts
)
dense = transformers.BertModel(config).eval()


def batch():
    ids = torch.randint(0, 500, (16, 24))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


cut = compile_pruned(
    dense,
    target="edge",
    calibration=[batch() for _ in range(16)],
    config=PruneConfig(sparsity=0.7, at={"sequence": 24}),
    output="recover-cut",
    measure=False,
)

# A plain module: the names of its parameters are those of the dense model.
pruned = cut.module()
optimizer = torch.optim.AdamW(pruned.parameters(), lr=3e-3)
losses = []
for _ in range(100):
    inputs = batch()
    with torch.no_grad():
        wanted = dense(**inputs).last_hidden_state
    loss = (pruned(**inputs).last_hidden_state - wanted).square().mean() / wanted.square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"relative error {losses[0]:.4f} -> {losses[-1]:.4f}")

trained = compile_pruned(
    pruned, target="edge", example_inputs=batch(), config=None, output="recover-trained", measure=False
)
print(trained.path, trained.report["verification"][-1]["status"])
