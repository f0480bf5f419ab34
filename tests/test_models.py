"""Every architecture of the zoo, from a random model to a verified artifact."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import tilecut.prepare
from checks import randomise
from support import HARDLY_ANY, groups_by_kind, support_of, titles_in_readme
from tilecut import PruneConfig, compile_pruned
from tilecut.make_cases import make_inputs
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.graph import Graph
from tilecut_passes.mask import Mask
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import CaptureError
from zoo import ZOO, RoutedMoe, with_x

SHAPES = ((2, 9), (3, 13))


def made(name: str) -> tuple[Any, Any]:
    """A model of the zoo with every parameter and buffer re-randomised, and its example inputs."""
    torch.manual_seed(0)
    built = ZOO[name].build()
    model, example = built if isinstance(built, tuple) else (built, None)
    return randomise(model), example


def uneven_plan(graph: Graph, seed: int) -> PrunePlan:
    """A plan that cuts every group that it can, by another number of units in each."""
    rng = random.Random(seed)
    groups = [g for g in find_groups(infer(graph)) if g.kind in groups_by_kind(graph)]
    kept = {g.name: sorted(rng.sample(range(g.size), rng.randint(g.least, max(g.size - 1, g.least)))) for g in groups}
    return PrunePlan.keep_all(graph, groups).keeping(kept)


def outputs(graph: Graph, one: Any) -> list[dict[str, torch.Tensor]]:
    """What a graph gives at two shapes after a pass."""
    changed = graph.copy()
    run_passes(changed, [one])
    return [changed.run(make_inputs(graph, *shape, seed=i)) for i, shape in enumerate(SHAPES)]


def with_another_unit(plan: PrunePlan) -> PrunePlan:
    """The plan with one kept unit of the largest group swapped for one that goes."""
    group = max((g for g in plan.groups if len(g.kept) < g.size), key=lambda g: g.size)
    other = next(u for u in range(group.size) if u not in group.kept)
    return plan.keeping({group.name: sorted([*group.kept[1:], other])})


@pytest.mark.parametrize("name", ZOO)
def test_goes_through(name, tmp_path, monkeypatch):
    model, example = made(name)
    dense = capture(model, example)
    assert groups_by_kind(dense) == ZOO[name].groups
    support = support_of(dense, ZOO[name].frozen)
    assert support.why or support.frozen < HARDLY_ANY

    plan = uneven_plan(dense, seed=3)
    cut = [g for g in plan.groups if len(g.kept) < g.size]
    assert len({g.kind for g in cut}) >= min(2, len(ZOO[name].groups))
    want = outputs(dense, Mask(plan))
    for a, b in zip(want, outputs(dense, Prune(plan)), strict=True):
        assert largest_error(a, b) <= 1e-4
    swapped = outputs(dense, Prune(with_another_unit(plan)))
    assert max(largest_error(a, b) for a, b in zip(want, swapped, strict=True)) > 1e-3

    # The same capture again: it takes longer than everything else.
    monkeypatch.setattr(tilecut.prepare, "capture", lambda *given: dense.copy())
    artifact = compile_pruned(
        model, "edge", example, None, PruneConfig(sparsity=0.5, method="magnitude"), tmp_path / "out", measure=False
    )
    rungs = {r.name: r for r in artifact.manifest.verification}
    for rung in ("cut equals masked dense", "artifact equals pruned model"):
        assert rungs[rung].status == "passed" and rungs[rung].figure is not None
    macs = artifact.report["macs"]
    assert macs["prunable_pruned"] <= 0.5 * macs["prunable_dense"]

    assert ZOO[name].title in titles_in_readme(support), "README's table is of another state: make models"


def test_a_branch_on_a_mask_is_one_error_that_names_the_line(capfd):
    model, example = with_x(RoutedMoe(guarded=True))
    with pytest.raises(CaptureError, match=r"zoo\.py:\d+ `if not self\.guarded or mask\.any\(\):`.*drop an `if`"):
        compile_pruned(model, "edge", example)
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


class MixedHeads(torch.nn.Module):
    """An attention whose scores are normalised over the heads: none of them stands alone."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (torch.nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)

    def forward(self, x):
        b, s, d = x.shape
        q, k, v = (p(x).view(b, s, 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2), dim=1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(b, s, d))
        return x + self.down(torch.relu(self.up(x)))


def test_an_attention_that_cannot_be_cut_is_left_alone_with_the_reason(tmp_path):
    model, example = with_x(randomise(MixedHeads()))
    with pytest.warns(UserWarning, match="no calibration data"):
        artifact = compile_pruned(
            model, "edge", example, None, PruneConfig(sparsity=0.5), tmp_path / "out", measure=False
        )
    assert [g.kind for g in artifact.plan.groups if len(g.kept) < g.size] == ["neurons"]
    assert "softmax runs over it" in {f.why for f in artifact.plan.frozen if f.name.startswith("q.weight")}


@pytest.mark.parametrize("name", ["bloom", "llama_gqa", "t5"])
def test_a_plan_from_json_applies_to_a_fresh_capture(name, tmp_path):
    dense = capture(*made(name))
    plan = uneven_plan(dense, seed=5)
    plan.write(tmp_path / "plan.json")
    fresh = capture(*made(name))
    for a, b in zip(
        outputs(dense, Mask(plan)), outputs(fresh, Prune(PrunePlan.read(tmp_path / "plan.json"))), strict=True
    ):
        assert largest_error(a, b) <= 1e-4
