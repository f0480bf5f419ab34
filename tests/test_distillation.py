"""The loss of recovery against its definition in float64, and that parts of a batch add up to the batch."""

import pytest
import torch
import transformers
from torch import nn

from checks import bert_graph, groups_of, random_plan, randomise, text_batch
from launched_recovery import made
from tilecut.distillation import Distillation, residual_sums
from tilecut.make_cases import make_inputs
from tilecut.recovery_config import Recovery
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune, as_cut
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import CalibrationError
from zoo import ZOO

CPU = torch.device("cpu")


def halved(dense, *kinds):
    groups = groups_of(dense, *kinds)
    pruned = dense.copy()
    plan = PrunePlan.keep_all(dense, groups).keeping({g.name: range(g.size // 2) for g in groups})
    run_passes(pruned, [Prune(plan)])
    return pruned, plan


def value(loss):
    return float(loss.detach())


def relative(want, got, keep, median):
    """The mean over kept positions of the squared error relative to the row's square, or the median's."""
    x, y = want[keep].double(), got[keep].double()
    return float(((x - y).square().sum(-1) / x.square().sum(-1).clamp_min(median)).mean())


def test_the_loss_is_what_it_says():
    dense, (batch, *_) = made(1)
    pruned, _ = halved(dense)
    config = Recovery(temperature=3.0, hidden=0.5, labels="task", distillation=0.25)
    task = Distillation.of(dense, pruned, config, CPU, [batch])
    keep = batch.inputs["attention_mask"] != 0
    want, got = task.teacher.run(batch.inputs), task.student.run(batch.inputs)
    median = float(want["hidden"][keep].double().square().sum(-1).median())
    p, q = ((out["logits"].double() / 3).log_softmax(-1) for out in (want, got))
    divergence = 9 * float((p.exp() * (p - q)).sum(-1).mean())
    states = [
        relative(want[n], got[n], keep, float(want[n][keep].double().square().sum(-1).median()))
        for n in want if n.startswith("hidden ")
    ]  # fmt: skip
    assert len(states) == 4
    outputs = (divergence + relative(want["hidden"], got["hidden"], keep, median)) / 2
    labels = float(nn.functional.cross_entropy(got["logits"].double(), batch.labels))
    loss = 0.25 * (outputs + 0.5 * sum(states) / 4) + 0.75 * labels
    assert value(task.loss(batch, batch)) == pytest.approx(loss, rel=1e-5)
    assert value(task.loss(batch, batch, hidden=False)) == pytest.approx(0.25 * outputs + 0.75 * labels, rel=1e-5)


def test_nothing_lost_is_no_loss():
    dense, batches = made(2)
    task = Distillation.of(dense, dense.copy(), Recovery(), CPU, batches)
    assert task.hidden == [] and value(task.loss(batches[0], batches[0])) == 0


@pytest.mark.parametrize("labels", [None, "task"])
def test_parts_of_a_batch_add_up(labels):
    dense, batches = made(3)
    batches[0].labels[1:4] = -100
    pruned, _ = halved(dense)
    task = Distillation.of(dense, pruned, Recovery(labels=labels), CPU, batches)
    for batch in batches:
        parts = [Batch({k: v[i::4] for k, v in batch.inputs.items()}, batch.labels[i::4]) for i in range(4)]
        summed = sum(value(task.loss(part, batch)) for part in parts)
        assert summed == pytest.approx(value(task.loss(batch, batch)), rel=1e-5)


def test_what_padding_holds_does_not_count():
    dense = bert_graph()
    pruned, _ = halved(dense)
    (batch,) = check_batches(dense, [text_batch(4, 9)])
    ids = torch.where(batch.mask != 0, batch.inputs["input_ids"], 7)
    other = Batch({**batch.inputs, "input_ids": ids})
    task = Distillation.of(dense, pruned, Recovery(), CPU, [batch])
    assert value(task.loss(batch, batch)) == pytest.approx(value(task.loss(other, other)), rel=1e-5)


@pytest.mark.parametrize(
    ("build", "sums"),
    [
        (lambda: transformers.GPT2Model(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50)), 4),
        # Attention and FFN are added to each other before they are added to the stream.
        (
            lambda: transformers.GPTJModel(
                transformers.GPTJConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=50, rotary_dim=4, n_positions=64)
            ),
            2,
        ),
    ],
)
def test_hidden_states_are_the_residual_streams_sums(build, sums):
    dense = capture(randomise(build()))
    pruned, _ = halved(dense, "heads", "neurons")
    found = residual_sums(dense, pruned)
    assert len(found) == sums
    shapes = {tuple(n.meta["val"].shape[2:]) for n in dense.nodes if n.name in found}
    assert shapes == {(16,)}


class Heads(nn.Module):
    """An attention, an answer's start for each text, one number for each, and an integer for each position."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.q, self.k, self.v, self.out, self.start = (nn.Linear(16, n) for n in (16, 16, 16, 16, 1))

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, 4, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, s, -1))
        return {"start_logits": self.start(x).squeeze(-1), "largest": x.argmax(-1), "mean": x.mean((1, 2))}


def test_outputs_of_low_rank_and_of_integers():
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    dense = capture(randomise(Heads()), example)
    pruned, _ = halved(dense, "heads")
    given = text_batch(5, 9, vocab=50)
    batch = Batch({k: given[k] for k in example})
    task = Distillation.of(dense, pruned, Recovery(), CPU, [batch])
    assert task.compared == ["start_logits", "mean"]
    parts = [Batch({k: v[i::2] for k, v in batch.inputs.items()}) for i in range(2)]
    assert sum(value(task.loss(p, batch)) for p in parts) == pytest.approx(value(task.loss(batch, batch)), rel=1e-5)
    assert Distillation.of(dense, pruned, Recovery(), CPU, [batch], outputs=["mean"]).compared == ["mean"]
    with pytest.raises(CalibrationError, match="no floating output of the dense one's shape; got largest"):
        Distillation.of(dense, pruned, Recovery(), CPU, [batch], outputs=["largest"])


def test_a_cache_is_cut_and_not_compared():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = randomise(transformers.LlamaForCausalLM(config))
    cache = transformers.DynamicCache(ddp_cache_data=[(torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4))] * 2)
    ids = torch.randint(0, 50, (2, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones(2, 8, dtype=torch.long), "past_key_values": cache}
    dense = capture(model, inputs)
    pruned, plan = halved(dense, "kv_groups", "neurons")
    batches = check_batches(dense, [inputs])
    task = Distillation.of(dense, pruned, Recovery(), CPU, batches, as_cut(dense, plan))
    assert task.compared == ["logits"] and len(task.hidden) == 4
    task.loss(batches[0], batches[0]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters().values())


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_bf16_runs_and_is_near(name):
    dense = capture(randomise(ZOO[name].build()))
    pruned = dense.copy()
    run_passes(pruned, [Prune(random_plan(dense, 1, "heads", "kv_groups", "neurons"))])
    batch = Batch(make_inputs(dense, 2, 9, seed=1))
    losses = [
        value(Distillation.of(dense, pruned, Recovery(precision=p), CPU, [batch]).loss(batch, batch))
        for p in ("fp32", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[0] != losses[1]
