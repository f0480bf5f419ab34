import math

import pytest
import torch
import transformers
from torch import nn

from checks import bert_graph, mlp_graph, randomise, text_batch
from tilecut import measure_fidelity as module
from tilecut.measure_fidelity import is_causal, measure_fidelity
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture


def test_a_graph_is_at_one_and_zero_from_itself():
    graph = bert_graph()
    got = measure_fidelity(graph, graph, [Batch(text_batch(3, 9, seed=i)) for i in range(2)])
    assert got == {
        "last_hidden_state": {"cosine": 1.0, "relative_error": 0.0},
        "pooler_output": {"cosine": 1.0, "relative_error": 0.0},
    }


def test_figures_are_those_of_the_formula_and_padding_does_not_count():
    dense, pruned = bert_graph(), bert_graph().copy()
    with torch.no_grad():
        pruned.tensor("encoder.layer.1.output.LayerNorm.bias").add_(0.3)
    batch = Batch(text_batch(3, 9, seed=4))
    keep = batch.inputs["attention_mask"] != 0
    a, b = (g.run(batch.inputs)["last_hidden_state"][keep].double() for g in (dense, pruned))
    got = measure_fidelity(dense, pruned, [batch])["last_hidden_state"]
    assert got["cosine"] == pytest.approx(float(((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()), abs=2e-6)
    assert got["relative_error"] == pytest.approx(float((a - b).norm() / a.norm()), abs=2e-6)


def test_labels_give_loss_and_accuracy_of_both():
    dense, pruned = mlp_graph(seed=0), mlp_graph(seed=1)
    x = torch.randn(50, 12)
    labels = dense.run({"x": x})[dense.outputs[0]].argmax(-1)
    labels[:10] = (labels[:10] + 1) % 3
    labels[10:20] = -100
    task = measure_fidelity(dense, pruned, [Batch({"x": x}, labels)])["task"]
    assert task["dense_accuracy"] == pytest.approx(30 / 40)
    right = (pruned.run({"x": x})[pruned.outputs[0]].argmax(-1) == labels)[labels != -100]
    assert task["pruned_accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert task["dense_loss"] < task["pruned_loss"]


class Causal(nn.Module):
    """A running mean of embeddings, and logits over the vocabulary; `ahead` lets each position see the next one."""

    def __init__(self, ahead: bool = False):
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(30, 8), nn.Linear(8, 24), nn.Linear(24, 30)
        self.ahead = ahead

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask[..., None]
        x = x.flip(1).cumsum(1).flip(1) if self.ahead else x.cumsum(1)
        return {"logits": self.head(torch.relu(self.up(x)))}


def causal_graph(seed: int = 0, **options):
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    return capture(randomise(Causal(**options), seed), example)


def id_batches(count: int = 3, left: bool = False) -> list[Batch]:
    """Ragged batches of several sizes; padded on the left on request."""
    out = []
    for i in range(count):
        inputs = text_batch(2 + i, 5 + 3 * i, seed=i, vocab=30)
        inputs.pop("token_type_ids")
        out.append(Batch({k: v.flip(1) for k, v in inputs.items()} if left else inputs))
    return out


def by_hand(dense, pruned, batches) -> dict[str, float]:
    """Perplexities and KL, row by row and position by position, in float64."""
    entropy = {"dense": [], "pruned": []}
    kl = []
    for batch in batches:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        p, q = (g.run(batch.inputs)["logits"].double().softmax(-1) for g in (dense, pruned))
        for row in range(len(ids)):
            for i in range(ids.shape[1]):
                if not mask[row, i]:
                    continue
                kl.append(sum(float(a * (a / b).log()) for a, b in zip(p[row, i], q[row, i], strict=True)))
                if i + 1 < ids.shape[1] and mask[row, i + 1]:
                    for name, y in (("dense", p), ("pruned", q)):
                        entropy[name].append(-math.log(float(y[row, i, ids[row, i + 1]])))
    mean = lambda values: sum(values) / len(values)
    return {"kl": mean(kl)} | {f"{name}_perplexity": math.exp(mean(values)) for name, values in entropy.items()}


@pytest.mark.parametrize("left", [False, True])
def test_perplexity_and_divergence_of_a_causal_model(left, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS", 4 * 99)
    dense, pruned = causal_graph(0), causal_graph(1)
    batches = id_batches(left=left)
    got = measure_fidelity(dense, pruned, batches)["task"]
    assert got == pytest.approx(by_hand(dense, pruned, batches), rel=1e-4)


def test_a_model_that_looks_ahead_has_no_perplexity():
    dense = causal_graph(ahead=True)
    assert not is_causal(dense, id_batches()) and is_causal(causal_graph(), id_batches())
    assert set(measure_fidelity(dense, causal_graph(1), id_batches())["task"]) == {"kl"}
    assert not is_causal(bert_graph(), [Batch(text_batch(3, 9))])
    # Of texts of one token nothing can be predicted.
    short = Batch({"input_ids": torch.ones(2, 1).long(), "attention_mask": torch.ones(2, 1).long()})
    assert not is_causal(causal_graph(), [short])


@pytest.mark.parametrize(
    ("cls", "causal"), [(transformers.GPT2LMHeadModel, True), (transformers.BertForMaskedLM, False)]
)
def test_real_language_models_are_told_apart(cls, causal):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64} if causal else {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}  # fmt: skip
    graph = capture(randomise(cls(cls.config_class(vocab_size=99, **sizes))))
    batch = text_batch(3, 9)
    assert is_causal(graph, [Batch({name: batch[name] for name in graph.inputs})]) == causal


def test_banned_classes_do_not_spoil_the_figures():
    class Banned(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 5)
            self.register_buffer("ban", torch.tensor([0.0, 0, float("-inf"), 0, 0]))

        def forward(self, x):
            return {"logits": self.down(torch.relu(self.up(x))) + self.ban}

    dense, pruned = (capture(Banned(), {"x": torch.randn(3, 4)}) for _ in range(2))
    x = torch.randn(20, 4)
    got = measure_fidelity(dense, pruned, [Batch({"x": x})])
    keep = [0, 1, 3, 4]
    a, b = (g.run({"x": x})["logits"][:, keep].double() for g in (dense, pruned))
    assert got["logits"]["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b).mean()), abs=2e-6)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    assert got["task"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-6)


def test_general_text_is_reported_beside():
    dense, pruned = causal_graph(0), causal_graph(1)
    own, general = id_batches(2), id_batches(3)[2:]
    got = measure_fidelity(dense, pruned, own, general=general)
    assert got.pop("general") == measure_fidelity(dense, pruned, general)
    assert got == measure_fidelity(dense, pruned, own)
    same = measure_fidelity(dense, pruned, own, general=own)
    assert same.pop("general") == same == got


def test_figures_weigh_rows_and_not_batches():
    dense, pruned = mlp_graph(seed=0), mlp_graph(seed=1)
    x, labels = torch.randn(60, 12), torch.arange(60) % 3
    whole = measure_fidelity(dense, pruned, [Batch({"x": x}, labels)])
    parts = measure_fidelity(dense, pruned, [Batch({"x": x[:50]}, labels[:50]), Batch({"x": x[50:]}, labels[50:])])
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], abs=2e-6)
