"""Recovery: it makes the model better and never worse, resumes to the same bits, and n processes do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import launched_recovery
import tilecut
import tilecut_passes
import tilecut_runtime
import tilecut_targets
from checks import ROOT, groups_of
from launched_recovery import made
from tilecut.recover import learning_rate, recover, shares, training_batches
from tilecut.recovery_config import Recovery
from tilecut_passes.calibration import Batch, check_batches
from tilecut_passes.capture import capture
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.errors import CalibrationError, ConfigError, RecoveryError

QUICK = Recovery(epochs=2, learning_rate=5e-3)


def cut_half(dense):
    groups = groups_of(dense)
    pruned = dense.copy()
    run_passes(pruned, [Prune(PrunePlan.keep_all(dense, groups).keeping({g.name: range(g.size // 2) for g in groups}))])
    return pruned


@pytest.fixture(scope="module")
def task():
    dense, batches = made(8)
    return dense, batches[:5], batches[5:]


def trained(task, config=QUICK, seed=0, **options):
    dense, fit, held_out = task
    pruned = cut_half(dense)
    report = recover(dense, pruned, fit, held_out, config, seed, **options)
    return weights(pruned), report


def weights(graph):
    return {name: t.detach().clone() for name, t in graph.tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_it_follows_the_dense_model_again_and_leaves_that_alone(task):
    dense, fit, held_out = task
    before = weights(dense)
    pruned = cut_half(dense)
    start = weights(pruned)
    report = recover(dense, pruned, fit, held_out, Recovery(epochs=6, learning_rate=5e-3))
    assert report.held_out_loss[report.best_epoch] == min(report.held_out_loss) < 0.6 * report.held_out_loss[0]
    assert len(report.held_out_loss) == 7 and len(report.training_loss) == 6 and report.steps == 30
    assert report.compared == ["logits", "hidden"] and report.hidden_states == 4
    assert same(before, weights(dense))
    # Tensors that were not cut were shared with the dense graph, and with the caller's model.
    assert not any(torch.equal(start[n], t) for n, t in weights(pruned).items())
    assert all(isinstance(t, nn.Parameter) and t.requires_grad for t in pruned.tensors.values())


def test_the_seed_decides_and_nothing_else(task):
    a, b, c = trained(task)[0], trained(task)[0], trained(task, seed=1)[0]
    assert same(a, b) and not same(a, c)


def test_bf16_gets_nearly_as_far(task):
    full, short = (trained(task, Recovery(epochs=4, learning_rate=5e-3, precision=p))[1] for p in ("fp32", "bf16"))
    assert short.held_out_loss[-1] < 1.1 * full.held_out_loss[-1]
    assert short.held_out_loss != full.held_out_loss


def test_accumulating_is_a_larger_batch(task):
    dense, fit, held_out = task
    whole = [Batch({k: torch.ones_like(v) if "mask" in k else v for k, v in b.inputs.items()}) for b in fit[:4]]
    joined = [Batch({k: torch.cat([b.inputs[k] for b in whole]) for k in whole[0].inputs})]
    # Plain sums of gradients differ in their last bits, and AdamW's first step is their sign.
    config = Recovery(epochs=1, learning_rate=1e-3, warmup=0, accumulate=4, batch_rows=None)
    parts, once = trained((dense, whole, held_out), config)[1], trained((dense, joined, held_out), config)[1]
    assert parts.steps == once.steps == 1
    assert parts.training_loss[0] == pytest.approx(once.training_loss[0], rel=1e-5)
    assert parts.held_out_loss[1] == pytest.approx(once.held_out_loss[1], rel=1e-4)


def test_labels_are_learned(task):
    config = Recovery(epochs=12, learning_rate=1e-2, labels="task", distillation=0.0)
    dense, fit, _ = task
    report = trained((dense, fit, fit), config)[1]
    assert report.held_out_loss[-1] < 0.2 * report.held_out_loss[0]
    mixed = trained((dense, fit, fit), Recovery(epochs=1, labels="task"))[1].held_out_loss[0]
    apart = [trained((dense, fit, fit), Recovery(epochs=1, **kw))[1].held_out_loss[0]
             for kw in ({}, {"labels": "task", "distillation": 0.0})]  # fmt: skip
    assert mixed == pytest.approx(sum(apart) / 2, rel=1e-5)


def test_labels_that_are_not_there(task):
    dense, fit, held_out = task
    bare = [Batch(b.inputs) for b in fit]
    with pytest.raises(CalibrationError, match="recover: no batch has labels; add labels"):
        trained((dense, bare, held_out), Recovery(labels="task"))
    with pytest.raises(CalibrationError, match="no batches to train on"):
        trained((dense, [], held_out))


class Normed(nn.Module):
    """A batch norm, a frozen layer, and a weight that is there twice."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 6)
        self.back, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.back.weight
        self.down.bias.requires_grad_(False)

    def forward(self, x):
        return self.again(torch.relu(self.back(self.down(torch.relu(self.norm(self.up(x)))))))


def test_what_is_not_trained(task):
    model = Normed().eval()
    model.norm.running_mean.normal_()
    dense = capture(model, torch.randn(8, 6))
    batches = check_batches(dense, [{"x": torch.randn(8, 6)} for _ in range(4)])
    pruned = cut_half(dense)
    start = weights(pruned)
    recover(dense, pruned, batches, batches, Recovery(epochs=3, learning_rate=1e-2))
    moved = {name for name, t in weights(pruned).items() if not torch.equal(t, start[name])}
    assert start.keys() - moved == {"norm.running_mean", "norm.running_var", "down.bias"}
    # Tied weights are one tensor, and stay one.
    assert ("back.weight" in moved) != ("again.weight" in moved)
    assert same({n: t for n, t in model.state_dict().items() if n in dense.tensors}, weights(dense))


def test_nothing_to_train(task):
    dense = capture(Normed().requires_grad_(False).eval(), torch.randn(8, 6))
    batches = check_batches(dense, [{"x": torch.randn(8, 6)}])
    with pytest.raises(ConfigError, match="no parameter requires gradients"):
        recover(dense, cut_half(dense), batches, batches, QUICK)


def test_training_that_makes_it_worse_is_undone_and_said(task):
    dense, _, _held_out = task
    start = weights(cut_half(dense))
    after, report = trained(task, Recovery(epochs=2, learning_rate=0.9, clip=None))
    assert report.best_epoch == 0 and min(report.held_out_loss) == report.held_out_loss[0]
    assert same(start, after)
    assert "made the held-out loss no better" in report.notes[0]


def test_divergence_is_one_error_and_the_best_weights_stay(task):
    dense, fit, held_out = task
    pruned = cut_half(dense)
    start = weights(pruned)
    huge = Recovery(epochs=2, learning_rate=0.99, warmup=0, weight_decay=1e38)
    with pytest.raises(RecoveryError, match=r"not finite at step 2 of 10, learning rate 9\.\d+e-01; got .*lower learning_rate"):
        recover(dense, pruned, fit, held_out, huge)
    assert same(start, weights(pruned))


class Stop(Exception):
    pass


def stop_at(step):
    def progress(done, of):
        if done == step:
            raise Stop

    return progress


@pytest.mark.parametrize("step", [3, 8])
def test_a_resumed_run_ends_with_the_same_bits(task, tmp_path, step):
    config = Recovery(epochs=2, learning_rate=5e-3, checkpoint=str(tmp_path), checkpoint_every=3)
    want, straight = trained(task)
    with pytest.raises(Stop):
        trained(task, config, progress=stop_at(step))
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]
    got, report = trained(task, config)
    assert report.resumed_at == step // 3 * 3
    assert same(want, got)
    assert (report.held_out_loss, report.training_loss) == (straight.held_out_loss, straight.training_loss)
    # Done is done.
    again, report = trained(task, config)
    assert report.resumed_at == 10 and same(want, again)


def test_a_checkpoint_of_another_run_is_not_taken(task, tmp_path):
    options = {"epochs": 1, "checkpoint": str(tmp_path)}
    trained(task, Recovery(**options))
    for other in ({"learning_rate": 2e-3}, {"temperature": 1.0}):
        assert trained(task, Recovery(**options, **other))[1].resumed_at == 0
    assert trained(task, Recovery(**options), seed=5)[1].resumed_at == 0
    dense, fit, held_out = task
    assert trained((dense, fit[::-1], held_out), Recovery(**options))[1].resumed_at == 0
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:8] + b"\0" * 40 + b[48:]])
def test_a_damaged_checkpoint_is_put_aside(task, tmp_path, damage):
    config = Recovery(epochs=2, learning_rate=5e-3, checkpoint=str(tmp_path))
    want, _ = trained(task, config)
    (path,) = tmp_path.iterdir()
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match="cannot be read .* starts over, the file is kept as recovery-.*damaged"):
        got, report = trained(task, config)
    assert report.resumed_at == 0 and same(want, got)
    assert path.with_suffix(".damaged").read_bytes() == damaged


def test_a_checkpoint_folder_that_cannot_be(task, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="checkpoint is no folder to write to"):
        trained(task, Recovery(checkpoint=str(tmp_path / "file" / "folder")))


def test_the_learning_rate_rises_and_falls():
    config = Recovery(learning_rate=0.1, warmup=0.2)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[6] == pytest.approx(0.05)
    assert sorted(rates[2:], reverse=True) == rates[2:] and 0 < rates[-1] < 0.01
    assert learning_rate(0, 1, Recovery(warmup=0.0, learning_rate=0.1)) == 0.1


def test_shares_are_of_batches_where_that_is_even_else_of_rows(task, monkeypatch):
    dense, fit, _ = task
    for rank in range(2):
        monkeypatch.setattr("tilecut.recover.process", lambda rank=rank: (rank, 2))
        assert [id(part) for part, _ in shares(dense, fit[:4])] == [id(b) for b in fit[:4][rank::2]]
        (part, whole), *_ = shares(dense, fit[:3])
        assert whole is fit[0] and torch.equal(part.inputs["input_ids"], fit[0].inputs["input_ids"][rank::2])
        assert torch.equal(part.labels, fit[0].labels[rank::2])
        # A single row stays whole.
        one = [Batch({k: v[:1] for k, v in b.inputs.items()}) for b in fit[:3]]
        assert [id(part) for part, _ in shares(dense, one)] == [id(b) for b in one[rank::2]]


def test_batches_to_train_on_have_at_most_so_many_rows_and_lose_none(task):
    dense, fit, _ = task
    rows = [row for b in fit for row in b.inputs["input_ids"].tolist()]
    parts = training_batches(dense, fit, 3)
    assert max(len(b.labels) for b in parts) <= 3 < max(len(b.labels) for b in fit)
    assert sorted(row for b in parts for row in b.inputs["input_ids"].tolist()) == sorted(rows)
    assert training_batches(dense, fit, None) == list(fit)
    assert [id(b) for b in training_batches(dense, fit, 100)] == [id(b) for b in fit]


def test_smaller_batches_are_more_steps(task):
    _, fit, _ = task
    count = sum(-(-len(b.labels) // 2) for b in fit)
    assert trained(task, Recovery(epochs=1, batch_rows=2))[1].steps == count


def test_two_processes_do_what_one_does(tmp_path):
    """`accelerate launch` of calibration (obs, fisher), repair and recovery."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    launched_recovery.run(alone)
    packages = (tilecut, tilecut_targets, tilecut_passes, tilecut_runtime)
    paths = [str(Path(str(p.__file__)).parent.parent) for p in packages]
    script = ROOT / "tests" / "launched_recovery.py"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launch, script, together],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(folder / "weights.safetensors") for folder in (alone, together))
    assert (int(one.pop("processes")), int(two.pop("processes"))) == (1, 2)
    assert one.keys() == two.keys()
    for name, want in one.items():
        assert float((want - two[name]).norm()) <= 1e-5 * float(want.norm()), name
