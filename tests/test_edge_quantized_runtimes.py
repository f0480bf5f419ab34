"""Quantized artifacts of the runtimes behind "edge:": the same integers as the edge target's, in the runtime's own form."""

import openvino as ov
import pytest
import torch

from checks import compiled, emit, text_batch
from norm_models import llama
from tilecut import PruneConfig, load
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_runtime.errors import ConfigError
from tilecut_runtime.openvino_runner import open_openvino
from tilecut_targets.edge.find_runtime import find_runtime
from tilecut_targets.edge.openvino_ir import IR, SOURCE

CALIBRATION = [text_batch(4, 16, seed) for seed in range(4)]


def constants(path):
    return {
        op.get_element_type().get_type_name()
        for op in ov.Core().read_model(path).get_ops()
        if op.get_type_name() == "Constant"
    }


@pytest.mark.parametrize(
    ("how", "types", "group"),
    [
        ("int8", {"i8"}, "128"),
        ("int8-static", {"i8"}, None),
        ("int4", {"u4"}, "32"),
        ("int4:128", {"u4"}, "128"),
        ("fp16", {"f16"}, None),
    ],
)
def test_openvino_holds_few_bits_and_the_numbers_are_near(how, types, group, tmp_path):
    config = PruneConfig(sparsity=0.3, method="magnitude", quantize=how, at={"sequence": 16})
    made = compiled("edge:openvino", tmp_path / "a, b", config=config, calibration=CALIBRATION)
    assert types <= constants(made.path / IR)
    assert not list(made.path.glob(f"{SOURCE}*"))
    record = made.report["quantization"]
    assert (record["how"], made.manifest.quantize) == (how, how)
    assert record["bytes"]["after"] < record["bytes"]["before"]
    assert made.report["emitted"]["nodes"] > 0
    model = ov.Core().read_model(made.path / IR)
    where = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]
    assert (model.get_rt_info(where).astype(str) if model.has_rt_info(where) else None) == group
    assert {r.status for r in made.verify()} == {"passed"}
    inputs = text_batch(3, 9)
    rows = inputs["attention_mask"] != 0
    want = made.module()(**inputs).last_hidden_state[rows]
    got = torch.from_numpy(load(made.path, threads=1).run(inputs)["last_hidden_state"])[rows]
    assert 1e-7 * want.norm() < (got - want).norm() < made.manifest.tolerance * want.norm()


@pytest.mark.parametrize("how", ["int8", "int8-static", "int4"])
def test_a_mobile_file_is_made_of_the_quantized_one(how, tmp_path):
    config = PruneConfig(sparsity=0.3, method="magnitude", quantize=how, at={"sequence": 16})
    made = compiled("edge:ort-mobile", tmp_path / "a", config=config, calibration=CALIBRATION)
    sizes, ops = made.report["quantization"]["bytes"], made.report["emitted"]["ops"]
    assert sizes["after"] == (made.path / "model.ort").stat().st_size < sizes["before"]
    assert sum(ops.get(op, 0) for op in ("MatMulIntegerToFloat", "QuantizeLinear", "MatMulNBits")) > 0
    assert {r.status for r in made.verify()} == {"passed"}


def test_a_mobile_file_is_not_stored_in_16_bits():
    with pytest.raises(ConfigError, match=r"the edge:ort-mobile target has no such quantization; got 'fp16'"):
        find_runtime("ort-mobile").quantized("fp16")


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_a_head_that_is_the_table_is_read_by_openvino(how, tmp_path):
    graph = capture(llama(tie_word_embeddings=True))
    target = find_runtime("openvino").quantized(how)
    made = emit(target, graph, tmp_path / "a")
    target.quantize_files(made.folder, [])
    run = open_openvino(made.folder / IR, 1)
    x = make_inputs(graph, 2, 7, seed=1, ragged=False)
    want, got = graph.run(x)["logits"], torch.from_numpy(run({k: v.numpy() for k, v in x.items()})["logits"])
    assert 1e-6 * want.norm() < (got - want).norm() < target.limit * want.norm()


def test_executorch_multiplies_int8(tmp_path):
    config = PruneConfig(sparsity=0.3, method="magnitude", quantize="int8", at={"sequence": 16})
    made = compiled("edge:executorch", tmp_path / "a", config=config, calibration=CALIBRATION, measure=True)
    record, emitted = made.report["quantization"], made.report["emitted"]
    layers = 13
    assert record["products"] == layers == emitted["ops"]["xnnpack linear"]
    assert "embeddings.word_embeddings.weight" in {one["what"] for one in record["kept"]}
    assert 0 < emitted["ops"]["xnnpack quantized_decomposed.choose_qparams"] <= layers
    assert record["bytes"]["after"] == (made.path / "model.pte").stat().st_size < record["bytes"]["before"]
    assert sorted(p.name for p in made.path.glob("*.json")) == ["config.json", "manifest.json", "plan.json", "report.json"]
    assert {r.status for r in made.verify()} == {"passed"}
    assert len(made.report["latency"]["contenders"]) >= 3
    for batch, length in ((1, 1), (3, 9)):
        inputs = text_batch(batch, length)
        rows = inputs["attention_mask"] != 0
        want = made.module()(**inputs).last_hidden_state[rows]
        got = torch.from_numpy(load(made.path, threads=1).run(inputs)["last_hidden_state"])[rows]
        assert 1e-7 * want.norm() < (got - want).norm() < 0.1 * want.norm()


def test_runtimes_without_quantizations_refuse_the_word():
    with pytest.raises(ConfigError, match=r"has no such quantization; got 'int4'"):
        find_runtime("executorch").quantized("int4")
    for word in ("portable", "qnn", "coreml"):
        with pytest.raises(ConfigError, match=r"has no such quantization; got 'int8'"):
            find_runtime(word).quantized("int8")


def test_static_ranges_want_calibration_data():
    assert find_runtime("openvino").quantized("int8-static").needs_data
    assert not find_runtime("openvino").quantized("int8").needs_data
