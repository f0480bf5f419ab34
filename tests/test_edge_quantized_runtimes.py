"""Quantized artifacts of the runtimes behind "edge:": the same integers as the edge target's, in the runtime's own form."""

import openvino as ov
import pytest
import torch

from checks import compiled, emit, text_batch, tiny_bert
from tilecut import PruneConfig, load
from tilecut_passes.calibration import Batch
from tilecut_passes.capture import capture
from tilecut_runtime.errors import ConfigError
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


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_a_mobile_file_is_made_of_the_quantized_one(how, tmp_path):
    target = find_runtime("ort-mobile").quantized(how)
    made = emit(target, capture(tiny_bert(neurons=64)), tmp_path / "a")
    before = (made.folder / "model.ort").stat().st_size
    facts = target.quantize_files(made.folder, [Batch(b) for b in CALIBRATION])
    assert (made.folder / "model.ort").stat().st_size < before
    ops = facts["ops"]
    assert isinstance(ops, dict) and ops.get("MatMulIntegerToFloat", 0) + ops.get("MatMulNBits", 0) > 0


def test_executorch_multiplies_int8(tmp_path):
    config = PruneConfig(sparsity=0.3, method="magnitude", quantize="int8", at={"sequence": 16})
    made = compiled("edge:executorch", tmp_path / "a", config=config, calibration=CALIBRATION, measure=True)
    record, emitted = made.report["quantization"], made.report["emitted"]
    layers = 13
    assert record["products"] == layers == emitted["ops"]["xnnpack linear"]
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
