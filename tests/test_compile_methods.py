"""Whole compiles with the settings that change how a budget is met: methods, recovery, latency, offload, even layers."""

import pytest
import torch

from checks import randomise, text_batch, tiny_bert
from tilecut import PruneConfig, Recovery, compile_pruned, load
from tilecut.config import METHODS
from tilecut_passes.score import IMPORTANCES
from tilecut_runtime.errors import CalibrationError, ConfigError, RecoveryError

BATCHES = [text_batch(8, 12, seed=i) for i in range(10)]
HELD_OUT = text_batch(8, 12, seed=99)


def bert(**options):
    return tiny_bert(neurons=96, **options)


def compiled(model, output, **settings):
    config = PruneConfig(**{"sparsity": 0.5, "at": {"sequence": 12}, "seed": 1, **settings})
    return compile_pruned(model, "edge", None, BATCHES, config, output, measure=False)


def error(model, artifact) -> float:
    """Of the emitted artifact's hidden state, relative to the dense model's, on batches that nothing was fitted to."""
    keep = HELD_OUT["attention_mask"] != 0
    with torch.no_grad():
        want = model(**HELD_OUT).last_hidden_state[keep]
    got = load(artifact.path).run({k: v.numpy() for k, v in HELD_OUT.items()})["last_hidden_state"]
    return float((torch.from_numpy(got)[keep] - want).norm() / want.norm())


def test_every_importance_is_a_method():
    assert set(METHODS) == {"table", "fisher", *IMPORTANCES}
    with pytest.raises(CalibrationError, match="'taylor' needs labels"):
        compiled(bert(), "never", method="taylor")


@pytest.mark.parametrize("method", ["fisher", "obs", "wanda", "attention"])
def test_every_method_meets_the_budget_and_is_verified(method, tmp_path):
    artifact = compiled(bert(), tmp_path / "out", method=method, cache="")
    macs = artifact.report["macs"]
    assert 0.35 * macs["prunable_dense"] <= macs["prunable_pruned"] <= 0.5 * macs["prunable_dense"]
    assert {r.status for r in artifact.manifest.verification} == {"passed"}
    assert artifact.report["method"] == method


def test_masks_are_tuned_only_by_the_method_of_kwon(tmp_path):
    fisher = compiled(bert(), tmp_path / "fisher", method="fisher")
    table = compiled(bert(), tmp_path / "table")
    names = lambda artifact: {p["name"] for p in artifact.report["passes"]}
    assert "TuneMasks" in names(fisher) and "Reconstruct" not in names(fisher)
    assert "Reconstruct" in names(table) and "TuneMasks" not in names(table)


def test_refit_and_recovery_each_bring_it_nearer(tmp_path):
    model = bert()
    bare = error(model, compiled(model, tmp_path / "bare", reconstruct=False))
    refitted = error(model, compiled(model, tmp_path / "refitted"))
    artifact = compiled(model, tmp_path / "trained", finetune=Recovery(epochs=8, learning_rate=3e-3))
    assert error(model, artifact) < refitted < bare
    (trained,) = artifact.report["recovery"]
    assert trained["best_epoch"] > 0 and trained["held_out_loss"][-1] < trained["held_out_loss"][0]


def test_several_cuts_end_at_the_budget_or_above_the_floor(tmp_path):
    model = bert()
    done = compiled(model, tmp_path / "steps", finetune=Recovery(epochs=1, steps=3))
    macs = done.report["macs"]
    assert macs["prunable_pruned"] <= 0.5 * macs["prunable_dense"] and len(done.report["recovery"]) == 3
    with pytest.raises(RecoveryError, match="first cut falls under the floor"):
        compiled(model, tmp_path / "floor", finetune=Recovery(epochs=1, steps=2, floor=0.99999))
    assert not (tmp_path / "floor").exists()


def test_a_latency_budget_is_met_as_the_cost_model_sees_it(tmp_path):
    # Large enough that a run is mostly work that can go.
    model = tiny_bert(width=32, neurons=1024)
    free = compiled(model, tmp_path / "loose", sparsity=None, max_latency_ms=1e6)
    assert all(len(g.kept) == g.size for g in free.plan.groups)
    dense = free.report["predicted_ms"]["dense"]
    asked = 0.8 * dense
    cut = compiled(model, tmp_path / "cut", sparsity=None, max_latency_ms=asked)
    assert cut.report["predicted_ms"]["pruned"] <= asked
    assert any(len(g.kept) < g.size for g in cut.plan.groups)
    with pytest.raises(ConfigError, match="no legal model fits the budget of 1e-06 milliseconds"):
        compiled(model, tmp_path / "none", sparsity=None, max_latency_ms=1e-6)


def test_offload_changes_where_things_are_and_nothing_else(tmp_path):
    held = compiled(bert(), tmp_path / "held")
    away = compiled(bert(), tmp_path / "away", offload=str(tmp_path / "scratch"))
    assert held.plan == away.plan
    inputs = {k: v.numpy() for k, v in HELD_OUT.items()}
    a, b = (load(x.path).run(inputs)["last_hidden_state"] for x in (held, away))
    assert abs(a - b).max() < 1e-5


def test_even_layers_are_even(tmp_path):
    artifact = compiled(bert(), tmp_path / "out", uniform=True)
    for kind in ("heads", "neurons"):
        assert len({len(g.kept) for g in artifact.plan.groups if g.kind == kind}) == 1


def test_only_the_outputs_that_count_are_followed(tmp_path):
    made = [compiled(bert(), tmp_path / n, outputs=(n,)) for n in ("last_hidden_state", "pooler_output")]
    assert made[0].report["predicted_loss"] != made[1].report["predicted_loss"]
    with pytest.raises(ConfigError, match="no_such_output"):
        compiled(bert(), tmp_path / "none", outputs=("no_such_output",))


def test_the_callers_model_is_as_it_was(tmp_path):
    model = randomise(bert())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled(model, tmp_path / "out", finetune=Recovery(epochs=1), offload=str(tmp_path / "scratch"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
