"""Plans as JSON, and plans that do not belong."""

import json
from dataclasses import replace

import pytest
import torch

from checks import TinyMlp, bert_graph, groups_of, mlp_graph, random_plan, randomise
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.plan import PrunePlan
from tilecut_passes.token_plan import TokenPlan
from tilecut_runtime.errors import PlanError


def test_json_round_trip(tmp_path):
    plan = random_plan(bert_graph(), 1)
    plan.write(tmp_path / "plan.json")
    assert PrunePlan.read(tmp_path / "plan.json") == plan
    held = json.loads((tmp_path / "plan.json").read_text())
    assert set(held) == {"format", "model", "tensors", "aliases", "target", "at", "groups", "tokens", "frozen"}
    assert set(held["groups"][0]) == {"name", "kind", "size", "kept", "padded_to", "members"}
    assert set(held["groups"][0]["members"][0]) == {"parameter", "dim", "start", "view", "axis"}


def test_tokens_are_written_and_a_file_without_them_loads(tmp_path):
    plan = replace(random_plan(bert_graph(), 1), tokens=(TokenPlan("encoder.layer.0", 0.1), TokenPlan("b", 0.05, first=2)))
    plan.write(tmp_path / "plan.json")
    assert PrunePlan.read(tmp_path / "plan.json") == plan
    held = json.loads((tmp_path / "plan.json").read_text())
    assert held["tokens"][1] == {"after": "b", "keep": 0.05, "first": 2, "restored": "mean"}
    assert PrunePlan.from_json({k: v for k, v in held.items() if k != "tokens"}) == replace(plan, tokens=())
    assert [plan.tokens[0].count(n) for n in (1, 10, 11, 100)] == [1, 1, 2, 10]


@pytest.mark.parametrize("tokens", [[{"after": "a", "keep": 0}], [{"after": "a", "keep": 0.2}, {"after": "b", "keep": 0.3}]])
def test_tokens_that_cannot_be_are_refused(tokens):
    with pytest.raises(PlanError, match="can stay|tokens stay than are left"):
        PrunePlan.from_json({**random_plan(mlp_graph(), 1).as_json(), "tokens": tokens})


@pytest.mark.parametrize("tokens", [5, [{"keep": 0.5}], [{"after": "a", "keep": "half"}], [3]])
def test_malformed_tokens_are_refused(tokens):
    with pytest.raises(PlanError, match="malformed plan"):
        PrunePlan.from_json({**random_plan(mlp_graph(), 1).as_json(), "tokens": tokens})


def test_a_read_plan_applies_to_a_fresh_capture(tmp_path):
    random_plan(mlp_graph(), 2).write(tmp_path / "plan.json")
    fresh = mlp_graph()
    matched = PrunePlan.read(tmp_path / "plan.json").matched(fresh, find_groups(infer(fresh)))
    assert [g.name for g, _ in matched] == ["model:neurons"] or len(matched) == 1


@pytest.mark.parametrize(
    ("neurons", "message"),
    [(24, "is another one; got 24 neurons; wanted 20 neurons")],
)
def test_a_plan_for_another_model_is_refused_with_the_first_mismatch(neurons, message):
    plan = random_plan(mlp_graph(20), 1)
    with pytest.raises(PlanError, match=message):
        plan.matched(mlp_graph(neurons), groups_of(mlp_graph(neurons)))


def test_a_plan_for_a_model_that_differs_elsewhere_is_refused():
    plan = random_plan(mlp_graph(), 1)
    other = capture(randomise(TinyMlp(out=4)), torch.randn(4, 12))
    with pytest.raises(
        PlanError, match=r"made for another model; got tensor down.bias is float32 \[4\], in the plan float32 \[3\]"
    ):
        plan.matched(other, groups_of(other))


def test_a_plan_with_other_members_is_refused():
    graph = mlp_graph()
    held = random_plan(graph, 1).as_json()
    held["groups"][0]["members"][0]["start"] = 1
    with pytest.raises(PlanError, match="owns other slices"):
        PrunePlan.from_json(held).matched(graph, groups_of(graph))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "keeps nothing"),
        ([1, 1], "keeps a unit twice"),
        ([0, 20], "one that is not there; got 20"),
        ([-1], "one that is not there; got -1"),
    ],
)
def test_units_that_are_no_distinct_indices_are_refused(kept, message):
    graph = mlp_graph()
    with pytest.raises(PlanError, match=message):
        PrunePlan.keep_all(graph, groups_of(graph)).keeping({groups_of(graph)[0].name: kept})


def test_an_unknown_group_is_refused():
    graph = mlp_graph()
    with pytest.raises(PlanError, match="no such group; got nobody"):
        PrunePlan.keep_all(graph, groups_of(graph)).keeping({"nobody": [0]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "unknown plan format"),
        ('{"format": 9}', "unknown plan format; got 9; wanted 1"),
        ('{"format": 1}', "malformed plan"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        PrunePlan.read(tmp_path / "plan.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        PrunePlan.read(tmp_path / "none.json")
