"""compile_pruned with `quantize`: after pruning and fusing, measured before and after, recorded, verified, refused."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from checks import compiled, mlp_graph, run_onnx, text_batch, tiny_bert
from tilecut import Artifact, PruneConfig, cli, compile_pruned, load
from tilecut.compile import default_output
from tilecut_runtime.errors import CalibrationError, ConfigError, VerificationError
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.reference import Case, drift_rungs, verify_on_device
from tilecut_targets.edge.target import EdgeTarget, count_ops
from tilecut_targets.find_target import TARGETS, find_target


def config(**more):
    return PruneConfig(sparsity=0.5, at={"sequence": 16}, **more)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return compiled("edge", tmp_path_factory.mktemp("made") / "bert", config=config(quantize="int8"))


def test_the_pruned_model_is_what_is_quantized(artifact):
    ops = count_ops(artifact.path / "model.onnx")
    kept = [len(g.kept) for g in artifact.plan.groups if g.kind == "neurons"]
    assert ops["QAttention"] == 2 and not ops["Attention"] and not ops["MatMul"]
    assert sum(kept) < 2 * 512 and artifact.report["emitted"]["onnx_ops"] == dict(ops.most_common())


def test_manifest_and_report_say_so(artifact):
    q = artifact.report["quantization"]
    assert artifact.manifest.quantize == "int8" == q["how"] == artifact.report["config"]["quantize"]
    assert artifact.manifest.target == "edge" and artifact.manifest.tolerance == EdgeTarget.quantizations["int8"]
    assert q["bytes"]["after"] == (artifact.path / "model.onnx").stat().st_size < q["bytes"]["before"]
    assert set(q["fidelity"]) == {"to_pruned", "to_dense"}
    for figures in q["fidelity"].values():
        assert 0.99 < figures["last_hidden_state"]["cosine"] < 1
    # What the report says of the pruned model in float32 is about that.
    before, after = artifact.report["fidelity"], q["fidelity"]["to_dense"]
    assert before["last_hidden_state"] != after["last_hidden_state"]
    page = (artifact.path / "report.html").read_text(encoding="utf-8")
    assert "Quantization: int8" in page and "a table of less than a megabyte" in page


def test_every_ladder_knows_what_may_be_lost(artifact):
    for rungs in (Artifact(artifact.path).verify(), verify_on_device(artifact.path)):
        named = {r.name: r for r in rungs}
        for name, limit in (("relative error", 0.3), ("1 - cosine", 0.045)):
            r = named[f"quantized model: {name}"]
            assert (
                r.status == "passed"
                and r.figure is not None
                and r.limit == pytest.approx(limit)
                and 1e-7 < r.figure < limit / 5
            )
        assert "artifact equals pruned model" not in named


def test_the_artifact_loads_and_gives_the_pruned_models_numbers(artifact):
    inputs = text_batch(3, 9)
    rows = inputs["attention_mask"] != 0
    want = artifact.module()(**inputs).last_hidden_state[rows]
    got = torch.from_numpy(load(artifact.path).run(inputs)["last_hidden_state"])[rows]
    assert (got - want).norm() < 0.05 * want.norm()
    plain = run_onnx(artifact.path / "model.onnx", inputs)["last_hidden_state"][rows]
    assert (plain == got).all()


def test_the_float32_rung_is_as_it_was(tmp_path):
    rungs = {r.name: r for r in compiled("edge", tmp_path / "plain", config=config()).verify()}
    assert rungs["artifact equals pruned model"].limit == 1e-4
    assert Manifest.read(tmp_path / "plain").quantize is None


def test_a_model_that_loses_more_is_not_written(tmp_path):
    class Strict(EdgeTarget):
        quantizations: ClassVar = {"int4": 1e-3}

    with pytest.raises(VerificationError, match=r"quantized model: relative error.*'int8' loses less than 'int4'"):
        compiled(Strict(), tmp_path / "out", config=config(quantize="int4"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["int9", "", "INT8", "int4:64"])
def test_an_unknown_word_is_one_error_with_the_choices(how, tmp_path):
    with pytest.raises(ConfigError, match="edge target has no such quantization.*'int8' or 'int8-static' or 'int4'"):
        compiled("edge", tmp_path / "out", config=config(quantize=how))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [n for n in TARGETS if not n.startswith("edge")])
def test_targets_without_quantization_say_so(name):
    with pytest.raises(ConfigError, match=f"the {name} target has no such quantization; got 'int8'; wanted None"):
        find_target(name).quantized("int8")
    assert find_target(name).quantized(None) == find_target(name)


def test_a_targets_own_word_holds_where_the_config_has_none():
    assert find_target("edge").quantized(None).quantize is None
    assert EdgeTarget(quantize="int4").quantized(None).quantize == "int4"
    assert EdgeTarget(quantize="int4").quantized("fp16").quantize == "fp16"
    with pytest.raises(ConfigError, match="no such quantization"):
        EdgeTarget(quantize="int5").quantized(None)
    assert default_output(tiny_bert(), EdgeTarget(quantize="int4:128")) == "bertmodel-edge-int4-128"


@pytest.mark.parametrize("given", [None, config()])
def test_static_ranges_without_data_are_one_error(given, tmp_path):
    with pytest.raises(CalibrationError, match=r"'int8-static' takes the ranges.*calibration.*quantize='int8'"):
        compile_pruned(
            tiny_bert(), EdgeTarget(quantize="int8-static"), config=given, output=tmp_path / "out", measure=False
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["int8", "int8-static"])
def test_a_dense_model_is_quantized_too(how, tmp_path):
    made = compiled(EdgeTarget(quantize=how), tmp_path / "dense", config=None)
    assert made.report["macs"]["dense"] == made.report["macs"]["pruned"]
    assert made.report["quantization"]["how"] == how
    assert ("fidelity" in made.report["quantization"]) == (how == "int8-static")


def test_the_command_line_quantizes_and_shows(tmp_path, monkeypatch):
    seen = {}

    def spy(model, target, **options):
        seen.update(target=target, **options)
        raise ConfigError("spy", "stop")

    monkeypatch.setattr("tilecut.compile.compile_pruned", spy)
    CliRunner().invoke(cli.app, ["compile", "model", "--dense", "--quantize", "int8"])
    assert seen["target"].quantize == "int8" and seen["config"] is None


def test_inspect_shows_what_was_quantized(artifact):
    shown = CliRunner().invoke(cli.app, ["inspect", str(artifact.path)]).output
    assert "quantized: int8" in shown and "quantized (int8): 7 products, 2 attentions, 0 tables" in shown
    held = json.loads(CliRunner().invoke(cli.app, ["inspect", str(artifact.path), "--json"]).output)
    assert held["manifest"]["quantize"] == "int8"


def test_a_latency_budget_is_priced_in_integers():
    from tilecut_targets.edge.measure_layers import cache_key

    graph = mlp_graph()
    keys = [cache_key(t, graph, [], {"batch": 1}, 1) for t in (EdgeTarget(), EdgeTarget(quantize="int8"))]
    assert [k["quantize"] for k in keys] == [None, "int8"]


def case(want, rows):
    return Case({"x": np.zeros(1)}, {"y": np.asarray(want, np.float32)}, {"y": np.asarray(rows)})


def test_drift_is_relative_and_by_direction():
    one = case([[3, 4], [9, 9]], [True, False])
    assert one.drift({"y": np.array([[3, 4], [0, 0]], np.float32)}) == (0, 0)
    relative, turned = one.drift({"y": np.array([[-4, 3], [0, 0]], np.float32)})
    assert (relative, turned) == (pytest.approx(2**0.5), pytest.approx(1))
    assert one.drift({"y": np.array([[6, 8], [0, 0]], np.float32)}) == (pytest.approx(1), pytest.approx(0))
    for odd in ([[np.nan, 4], [0, 0]], [[np.inf, 4], [0, 0]]):
        assert one.drift({"y": np.array(odd, np.float32)}) == (np.inf, np.inf)
    assert one.drift({"y": np.zeros((1, 2), np.float32)}) == (np.inf, np.inf)
    banned = case([[3, -3.4e38]], [True])
    assert banned.drift({"y": np.array([[3, -3.4e38]], np.float32)}) == (0, 0)
    failed = drift_rungs([one], [{"y": np.array([[-4, 3], [0, 0]], np.float32)}], 0.5, "")
    assert [r.status for r in failed] == ["failed", "failed"]
