"""Attention strength against the weights that transformers and torch return, and where there is no attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from checks import groups_of, randomise, text_batch, tiny_bert
from score_models import batches_of, scored
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.run_passes import run_passes
from tilecut_passes.score import score
from zoo import GQA, LinearAttention, WrittenOutAttention


def confidences(weights, masks):
    """Mean over real queries of the largest weight: weights [B, H, Sq, Sk] and masks [B, Sq] of all batches."""
    rows = [one.detach().double().amax(-1).transpose(1, 2)[mask != 0] for one, mask in zip(weights, masks)]
    return torch.cat(rows).mean(0)


def units_of(ranking):
    """What every unit costs."""
    costs = torch.zeros(len(ranking.order), dtype=torch.float64)
    for i, unit in enumerate(ranking.order):
        costs[unit] = ranking.losses[-2 - i] - ranking.losses[-1 - i]
    return costs


def shares(scores):
    return (scores / scores.sum()).tolist()


def bert_confidences(batches):
    """By layer, from the attention weights that the eager model returns."""
    model = tiny_bert(attn="eager")
    with torch.no_grad():
        returned = [model(**b.inputs, output_attentions=True).attentions for b in batches]
    return [confidences([one[i] for one in returned], [b.mask for b in batches]) for i in range(2)]


@pytest.mark.parametrize("spelling", ["sdpa", "eager", "fused"])
def test_heads_of_a_padded_bert(spelling):
    """One scale for all heads of the model: a layer that attends less sharply costs less."""
    graph = capture(tiny_bert(attn="eager")) if spelling == "eager" else scored("bert")[0].copy()
    if spelling == "fused":
        run_passes(graph, [FuseAttention()])
    groups = groups_of(graph, "heads")
    batches = batches_of("bert", graph, labels=False)
    rankings = score("attention", graph, groups, batches)
    got = torch.cat([units_of(rankings[g.name]) for g in groups])
    assert got.tolist() == pytest.approx(shares(torch.cat(bert_confidences(batches))), rel=1e-4)


def test_a_kv_group_has_the_sum_of_its_heads_and_a_query_that_over_the_groups():
    graph, groups = scored("llama")
    batches = batches_of("llama", graph, labels=False)
    model = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA, attn_implementation="eager")))
    with torch.no_grad():
        returned = [model(**b.inputs, output_attentions=True).attentions[0] for b in batches]
    heads = confidences(returned, [b.mask for b in batches]).reshape(4, 2)
    for group, want in zip(groups[:2], (heads.sum(1), heads.sum(0))):
        got = score("attention", graph, [group], batches)[group.name]
        assert units_of(got).tolist() == pytest.approx(shares(want), rel=1e-4)
    both = score("attention", graph, groups[:2], batches)
    assert both[groups[0].name].losses[0] > 0 < both[groups[1].name].losses[0]


def test_heads_behind_the_batch_of_a_bmm():
    """nn.MultiheadAttention writes [batch * heads, Sq, Sk]."""
    model = randomise(WrittenOutAttention())
    graph = capture(model, {"x": torch.randn(2, 7, 32)})
    batches = [Batch({"x": torch.randn(3, 5, 32)}) for _ in range(2)]
    (group,) = groups_of(graph, "heads")
    with torch.no_grad():
        weights = [model.attention(*[b.inputs["x"]] * 3, average_attn_weights=False)[1] for b in batches]
    want = confidences(weights, [torch.ones(3, 5)] * 2)
    assert units_of(score("attention", graph, [group], batches)[group.name]).tolist() == pytest.approx(
        shares(want), rel=1e-4
    )


class SomeSeeNothing(nn.Module):
    """Its mask hides all keys from the second query."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, 4, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        sees = (torch.arange(s, device=x.device) != 1)[:, None].expand(s, s)
        return self.out(F.scaled_dot_product_attention(q, k, v, sees).transpose(1, 2).reshape(b, s, 16))


def test_a_query_that_sees_no_key_does_not_count():
    model = randomise(SomeSeeNothing())
    graph = capture(model, torch.randn(2, 7, 16))
    x = torch.randn(3, 6, 16)
    (group,) = groups_of(graph, "heads")
    q, k = (p(x).view(3, 6, 4, 4).transpose(1, 2) for p in (model.q, model.k))
    weights = (q @ k.transpose(-1, -2) * 4**-0.5).softmax(-1)
    mask = (torch.arange(6) != 1).expand(3, 6)
    got = score("attention", graph, [group], [Batch({"x": x})])[group.name]
    assert units_of(got).tolist() == pytest.approx(shares(confidences([weights], [mask])), rel=1e-4)


def test_neurons_have_their_mean_absolute_activation():
    graph, groups = scored("bert")
    batches = batches_of("bert", graph, labels=False)
    model: Any = tiny_bert()
    seen = []
    model.encoder.layer[0].output.dense.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs)
    want = torch.cat([x[b.mask != 0] for x, b in zip(seen, batches)]).abs().mean(0)
    (group,) = [g for g in groups if g.name == "encoder.layer.0:neurons"]
    got = score("attention", graph, [group], batches)[group.name]
    assert units_of(got).tolist() == pytest.approx(shares(want), rel=1e-4)


def test_heads_without_a_softmax_are_scored_by_activations():
    graph = capture(randomise(LinearAttention()), {"x": torch.randn(2, 7, 32)})
    groups = groups_of(graph, "heads")
    rankings = score("attention", graph, groups, [Batch({"x": torch.randn(3, 5, 32)})])
    assert [r.losses[0] for r in rankings.values()] == pytest.approx([1.0])
    assert all(cost > 0 for r in rankings.values() for cost in units_of(r))


def test_padding_changes_nothing():
    graph, groups = scored("llama")
    short = {k: v for k, v in text_batch(4, 6).items() if k != "token_type_ids"}
    padded = {k: F.pad(v, (0, 5)) for k, v in short.items()}
    one, two = (score("attention", graph, groups, check_batches(graph, [b])) for b in (short, padded))
    for group in groups:
        assert one[group.name].losses == pytest.approx(two[group.name].losses, rel=1e-4)


def test_progress_ends_at_its_total():
    graph, groups = scored("bert")
    seen = []
    score("attention", graph, groups, batches_of("bert", graph), progress=lambda *at: seen.append(at))
    assert seen[-1] == (8, 8) and seen == sorted(seen)
