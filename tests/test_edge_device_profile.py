"""Profiles of devices: static sizes, ops of the provider's documentation, and what is outside of it said."""

import onnx
import pytest
import torch

from checks import bert_graph, compiled, emit, randomise, text_batch
from tilecut import load
from tilecut_passes.capture import capture
from tilecut_runtime.errors import ConfigError
from tilecut_targets.edge.coreml_profile import CoreMlTarget
from tilecut_targets.edge.device_profile import outside, provider
from tilecut_targets.edge.qnn_profile import QnnTarget
from tilecut_targets.edge.target import EdgeTarget
from zoo import ZOO

BOTH = (QnnTarget(), CoreMlTarget())


@pytest.mark.parametrize("target", BOTH, ids=str)
def test_every_op_of_an_encoder_is_the_providers(target, tmp_path):
    made = emit(target, bert_graph(), tmp_path / "a", {"batch": 2, "sequence": 9})
    assert made.written.facts["outside_provider"] == {}
    *_, last = target.verify(made.folder, made.manifest, made.cases)
    assert (last.name, last.status) == (f"{target.word} device", "not run") and "it runs all nodes" in last.detail
    model = onnx.load(str(made.folder / "model.onnx"))
    sizes = [d.dim_value for v in (*model.graph.input, *model.graph.output) for d in v.type.tensor_type.shape.dim]
    assert all(sizes) and "Shape" not in made.written.facts["ops"]


@pytest.mark.parametrize("target", BOTH, ids=str)
def test_what_the_provider_does_not_list_is_said(target, tmp_path):
    folder = emit(EdgeTarget(), bert_graph(), tmp_path / "a").folder
    left = outside(folder / "model.onnx", target.word)
    assert left["Attention"] == 2 and left["BiasGelu"] == 2 and "MatMul" not in left
    assert provider(target.word)["source"].startswith("https://github.com/")


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_what_depends_on_lengths_alone_is_computed_at_compile_time(name, tmp_path):
    made = emit(CoreMlTarget(), capture(randomise(ZOO[name].build())), tmp_path / "a", {"batch": 2, "sequence": 9})
    assert not {"Range", "Less", "Where", "Cos", "Sin", "Shape"} & set(made.written.facts["ops"])
    assert made.written.facts["outside_provider"] == {}
    assert [r.status for r in CoreMlTarget().verify(made.folder, made.manifest, made.cases)] == [
        "passed", "passed", "not run",
    ]  # fmt: skip


def test_example_inputs_decide_the_sizes(tmp_path):
    artifact = compiled("edge:qnn", tmp_path / "a", example_inputs=text_batch(1, 24))
    assert [spec.shape for spec in artifact.manifest.inputs] == [(1, 24)] * 3
    facts = artifact.report["emitted"]
    assert facts["sizes"] == {"batch": [1, 1], "sequence": [24, 24]} and facts["sizes_from"] == "example_inputs"
    # One row: padded in the second case.
    inputs = {k: v.numpy() for k, v in text_batch(1, 24).items()}
    assert load(artifact.path).run(inputs)["pooler_output"].shape == (1, 64)
    assert len(list((artifact.path / "ref").iterdir())) == 2
    # The module keeps the model's own sizes.
    assert artifact.module()(**text_batch(5, 7))["pooler_output"].shape == (5, 64)


def test_without_example_inputs_the_sizes_are_those_that_macs_are_counted_at(tmp_path):
    artifact = compiled("edge:coreml", tmp_path / "a")
    assert {spec.shape for spec in artifact.manifest.inputs} == {(1, 16)}
    assert artifact.report["emitted"]["sizes_from"].startswith("at")
    assert artifact.report["latency"] == {"status": "not measured"}


def test_a_budget_of_milliseconds_is_refused(tmp_path):
    from tilecut import PruneConfig

    with pytest.raises(ConfigError, match="the edge:qnn target has no latency model"):
        compiled("edge:qnn", tmp_path / "a", config=PruneConfig(max_latency_ms=1.0))


def test_comparisons_with_numbers_other_than_zero_keep_their_meaning():
    from tilecut_targets.edge.coreml_profile import not_equal

    x = torch.tensor([0, 1, 2, -1])
    for other in (0, 1, 2.0):
        assert torch.equal(not_equal(x, other), x != other)
