"""The peer: Torch-Pruning (Fang et al., arXiv 2301.12900) on a BERT encoder, to the same share of the encoder's MACs.

Its Taylor importance needs gradients of a loss with labels: it gets the fixed head's cross entropy on the labelled train
texts, which tilecut's own methods never see. Heads go whole, the hidden width stays, every layer loses the same share:
what its documentation does for transformers. Its attention modules keep the number of heads that they had; they are told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Shares of MACs are matched to this by bisection of the pruning ratio.
TOLERANCE = 0.01


def encoder_macs(model: Any, sequence: int) -> int:
    """Multiply-accumulates of attention and FFN at batch 1."""
    total = 0
    for layer in model.encoder.layer:
        attention = layer.attention.self
        width, hidden = attention.query.out_features, attention.query.in_features
        total += sequence * (4 * width * hidden + 2 * layer.intermediate.dense.out_features * hidden)
        total += 2 * sequence * sequence * width
    return total


def taylor_gradients(model: Any, batches: Iterable[Mapping[str, Tensor]], head: tuple[Tensor, Tensor]) -> None:
    """Accumulate the gradients of the head's cross entropy in the model's parameters; `head` is weight [C, D], bias [C]."""
    model.zero_grad()
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        pooled = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        nn.functional.cross_entropy(pooled @ head[0].T + head[1], batch["labels"], reduction="sum").backward()


def cut(
    model: Any,
    importance: str,
    share: float,
    sequence: int,
    batches: Iterable[Mapping[str, Tensor]],
    head: tuple[Tensor, Tensor] | None,
    measure: Callable[[Any], int] | None = None,
) -> tuple[Any, float]:
    """A copy of the model with about `share` of its encoder's MACs (or of what `measure` counts), and the share it has.

    `head` is needed for the importance taylor alone.
    """
    measure = measure or (lambda one: encoder_macs(one, sequence))
    dense = measure(model)
    low, high = 0.0, 0.95
    best: tuple[Any, float] | None = None
    trained = copy.deepcopy(model)
    if importance == "taylor":
        assert head is not None
        taylor_gradients(trained, batches, head)
    for _ in range(9):
        ratio = (low + high) / 2
        pruned = _cut_at(trained, importance, ratio)
        got = measure(pruned) / dense
        if best is None or abs(got - share) < abs(best[1] - share):
            best = pruned, got
        if abs(got - share) <= TOLERANCE:
            break
        low, high = (ratio, high) if got > share else (low, ratio)
    assert best is not None
    return best


def _cut_at(trained: Any, importance: str, ratio: float) -> Any:
    import torch_pruning as tp

    model = copy.deepcopy(trained)
    # deepcopy leaves gradients behind.
    for new, old in zip(model.parameters(), trained.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    layers = model.encoder.layer
    heads: dict[nn.Module, int] = {one: layer.attention.self.num_attention_heads for layer in layers for one in _qkv(layer)}
    kept = [model.embeddings, model.pooler]
    kept += [d for layer in layers for d in (layer.attention.output.dense, layer.output.dense)]
    example: Any = {"input_ids": torch.ones(1, 8, dtype=torch.long), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    by = tp.importance.GroupTaylorImportance() if importance == "taylor" else tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=by,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=kept,
        output_transform=lambda out: out.last_hidden_state,
    )
    pruner.step()
    for layer in layers:
        attention = layer.attention.self
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.all_head_size = attention.query.out_features
    return model.zero_grad() or model.eval()


def _qkv(layer: Any) -> tuple[nn.Linear, ...]:
    attention = layer.attention.self
    return attention.query, attention.key, attention.value
