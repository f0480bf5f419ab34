"""target="ascend": the file for ATC, its twin that onnxruntime runs, and rungs that say what could not be run."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from checks import TinyEncoder, emit, encoder_graph, mlp_graph, randomise, run_onnx
from tilecut.make_cases import make_case, make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import largest_error
from tilecut_runtime.session import load
from tilecut_targets.ascend.lower_attention import LowerAttention
from tilecut_targets.ascend.target import ATC_MODEL, CHIPS, VERIFY_MODEL, WEIGHTS, AscendTarget
from tilecut_targets.unpack_attention import UnpackAttention


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    return emit(AscendTarget(), encoder_graph(), tmp_path_factory.mktemp("ascend") / "artifact")


@pytest.fixture(scope="module")
def atc(emitted):
    return onnx.load(str(emitted.folder / ATC_MODEL))


def inputs(batch, length):
    return make_inputs(encoder_graph(), batch, length, seed=batch)


def flash(model):
    return [n for n in model.graph.node if n.domain == "npu"]


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def producers(model):
    return {name: node for node in model.graph.node for name in node.output}


def test_every_layer_has_one_prompt_flash_attention_with_its_own_heads(emitted, atc):
    fused = flash(atc)
    assert [n.op_type for n in fused] == ["NPUPromptFlashAttention"] * 2
    assert [(attributes(n)["num_heads"], attributes(n)["num_key_value_heads"]) for n in fused] == [(2, 2), (3, 3)]
    assert {attributes(n)["scale_value"] for n in fused} == {0.25}
    assert {attributes(n)["input_layout"] for n in fused} == {b"BNSD"}
    # Left out, CANN would take 0 for "no limit".
    assert {attributes(n)[k] for n in fused for k in ("pre_tokens", "next_tokens")} == {2147483647}
    assert "Softmax" not in {n.op_type for n in atc.graph.node}
    facts = emitted.written.facts
    assert (facts["attention"], facts["fused_attention"], facts["soc"]) == (2, 2, "Ascend910B3")
    assert facts["onnx_nodes"] == len(atc.graph.node)


def test_the_mask_is_the_fifth_input_and_true_in_it_means_drop(emitted, atc, tmp_path):
    twin = onnx.load(str(emitted.folder / VERIFY_MODEL))
    for node in flash(atc):
        assert len(node.input) == 5 and node.input[3] == ""
        twin.graph.output.append(onnx.helper.make_tensor_value_info(node.input[4], TensorProto.BOOL, None))
    onnx.save(twin, str(tmp_path / "with_masks.onnx"))
    given = inputs(4, 9)
    assert (given["attention_mask"] == 0).any()
    got = run_onnx(tmp_path / "with_masks.onnx", given)
    for node in flash(atc):
        drop = got[node.input[4]]
        assert drop.shape == (4, 1, 9, 9)
        assert torch.equal(drop, (given["attention_mask"] == 0)[:, None, None, :].expand(4, 1, 9, 9))


def test_the_op_runs_in_half_precision_between_casts(atc):
    made = producers(atc)
    for node in flash(atc):
        for name in node.input[:3]:
            assert made[name].op_type == "Cast"
            assert attributes(made[name])["to"] == TensorProto.FLOAT16
        (reader,) = [n for n in atc.graph.node if node.output[0] in n.input]
        assert (reader.op_type, attributes(reader)["to"]) == ("Cast", TensorProto.FLOAT)


def test_the_operator_sets_are_what_atc_takes(atc):
    versions = {o.domain: o.version for o in atc.opset_import}
    assert (versions[""], versions["npu"]) == (19, 1)
    # Gelu came with 20.
    assert "Gelu" not in {n.op_type for n in atc.graph.node}
    assert {n.domain for n in atc.graph.node} == {"", "npu"}


def test_the_twin_is_the_same_file_with_one_function(emitted, atc):
    twin = onnx.load(str(emitted.folder / VERIFY_MODEL))
    assert not atc.functions
    assert [(f.domain, f.name) for f in twin.functions] == [("npu", "NPUPromptFlashAttention")]
    del twin.functions[:]
    assert twin.graph.SerializeToString(deterministic=True) == atc.graph.SerializeToString(deterministic=True)


def test_both_files_read_the_weights_beside_them(emitted):
    assert emitted.written.entry == {"model": ATC_MODEL, "verify": VERIFY_MODEL, "weights": WEIGHTS}
    table = encoder_graph().tensor("embed.weight").detach().numpy().tobytes()
    assert table in (emitted.folder / WEIGHTS).read_bytes()
    for name in (ATC_MODEL, VERIFY_MODEL):
        assert table[:64] not in (emitted.folder / name).read_bytes()
        model = onnx.load(str(emitted.folder / name), load_external_data=False)
        places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert places == {"weights.bin"}


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (8, 64), (3, 256)])
def test_the_twin_gives_the_models_numbers_within_half_precision(emitted, shape):
    given = inputs(*shape)
    want = encoder_graph().run(given)["hidden"]
    rows = given["attention_mask"] != 0
    got = run_onnx(emitted.folder / VERIFY_MODEL, given)["hidden"]
    assert got.isfinite().all()
    assert largest_error({"y": want[rows]}, {"y": got[rows]}) < AscendTarget.tolerance
    session = load(emitted.folder, device="reference")
    assert session.device == "reference"
    again = session.run({k: v.numpy() for k, v in given.items()})["hidden"]
    np.testing.assert_array_equal(again, got.numpy())


def test_without_its_function_the_twin_does_not_run(emitted):
    with pytest.raises(Exception, match="NPUPromptFlashAttention"):
        run_onnx(emitted.folder / ATC_MODEL, inputs(1, 3))


def test_a_right_twin_passes_and_what_needs_cann_is_said_to_be_not_run(emitted):
    checker, equal, built, npu = AscendTarget().verify(emitted.folder, emitted.manifest, emitted.cases)
    assert (checker.status, equal.name, equal.status) == ("passed", "verify twin equals pruned model", "passed")
    assert equal.limit == 2e-3
    # Not zero: half precision went through.
    assert equal.figure is not None and 1e-6 < equal.figure < 2e-3
    assert (built.name, built.status, npu.name, npu.status) == ("atc", "not run", "NPU", "not run")
    command = "atc --model=graph/model_atc.onnx --framework=5 --soc_version=Ascend910B3 --output=model"
    assert built.detail == f"needs CANN: {command}"
    assert "ref/" in npu.detail


def test_a_twin_of_another_model_fails(emitted):
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    other = capture(randomise(TinyEncoder(), seed=1), example)
    given = inputs(2, 9)
    rungs = AscendTarget().verify(emitted.folder, emitted.manifest, [make_case(given, other.run(given))])
    assert rungs[1].status == "failed"
    assert rungs[1].figure is not None and rungs[1].figure > 2e-2


@pytest.mark.parametrize("chip", CHIPS)
def test_a_chip_is_named_in_the_command(emitted, chip):
    target = AscendTarget(chip)
    assert target.soc == chip
    assert f"--soc_version={chip} " in target.verify(emitted.folder, emitted.manifest, emitted.cases[:1])[2].detail


def test_lowering_is_one_visible_tuple():
    assert AscendTarget().lowering == (UnpackAttention(), LowerAttention())


def test_heads_that_the_op_does_not_take_are_written_out(tmp_path):
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    graph = capture(randomise(TinyEncoder(heads=(2,), neurons=(20,), width=6)), example)
    made = emit(AscendTarget(), graph, tmp_path / "narrow")
    assert (made.written.facts["attention"], made.written.facts["fused_attention"]) == (1, 0)
    assert made.lowered.refusals[0].why == "head width 6, wanted a multiple of 16 up to 512"
    twin = onnx.load(str(made.folder / VERIFY_MODEL))
    assert not twin.functions and "Softmax" in {n.op_type for n in twin.graph.node}
    _, equal, *_ = AscendTarget().verify(made.folder, made.manifest, made.cases)
    assert equal.status == "passed"
    assert equal.figure is not None and equal.figure < 1e-5


def test_a_model_without_attention_and_with_small_weights_is_written_too(tmp_path):
    made = emit(AscendTarget(), mlp_graph(neurons=2), tmp_path / "mlp")
    _, equal, *_ = AscendTarget().verify(made.folder, made.manifest, made.cases)
    assert equal.status == "passed"
    case = made.cases[0]
    got = load(made.folder, device="reference").run(case.inputs)
    assert case.error(got) < 1e-5
