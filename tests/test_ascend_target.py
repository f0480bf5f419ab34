"""target="ascend": the file for ATC, its twin that onnxruntime runs, and rungs that say what could not be run."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from checks import TinyEncoder, emit, encoder_graph, mlp_graph, randomise, run_onnx
from tilecut.make_cases import make_case, make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.fuse_rms_norm import FuseRmsNorm
from tilecut_passes.fuse_rotary import FuseRotary
from tilecut_passes.run_passes import largest_error
from tilecut_runtime.errors import ArtifactError, ConfigError, LoweringError
from tilecut_runtime.manifest import list_files
from tilecut_runtime.session import load
from tilecut_targets.ascend import npu_ops
from tilecut_targets.ascend.build_script import SCRIPT, write_build_script
from tilecut_targets.ascend.chips import CHIPS
from tilecut_targets.ascend.lower_attention import LowerAttention
from tilecut_targets.ascend.lower_rms_norm import LowerRmsNorm
from tilecut_targets.ascend.lower_rotary import LowerRotary
from tilecut_targets.ascend.target import ATC_MODEL, VERIFY_MODEL, WEIGHTS, AscendTarget
from tilecut_targets.compute_in import ComputeIn
from tilecut_targets.fold_casts import FoldCasts
from tilecut_targets.unpack_attention import UnpackAttention


@pytest.fixture(scope="module", autouse=True)
def no_private_environments():
    """As on a machine without them, whatever this one has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilecut_targets.ascend.target.is_installed", lambda name: False)
        yield


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
    assert not atc.functions and not any(n.overload for n in atc.graph.node)
    functions = [(f.domain, f.name, f.overload) for f in twin.functions]
    assert functions == [("npu", "NPUPromptFlashAttention", "sparse_mode_0")]
    for node in flash(twin):
        assert node.overload == "sparse_mode_0"
        node.ClearField("overload")
    assert twin.graph.SerializeToString(deterministic=True) == atc.graph.SerializeToString(deterministic=True)


def test_both_files_read_the_weights_beside_them(emitted):
    assert emitted.written.entry == {
        "model": ATC_MODEL, "verify": VERIFY_MODEL, "weights": WEIGHTS, "build": SCRIPT,
    }  # fmt: skip
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
    assert largest_error({"y": want[rows]}, {"y": got[rows]}) < AscendTarget().tolerance
    session = load(emitted.folder, device="reference")
    assert session.device == "reference"
    again = session.run({k: v.numpy() for k, v in given.items()})["hidden"]
    np.testing.assert_array_equal(again, got.numpy())


def test_without_its_function_the_twin_does_not_run(emitted):
    with pytest.raises(Exception, match="NPUPromptFlashAttention"):
        run_onnx(emitted.folder / ATC_MODEL, inputs(1, 3))


def test_a_right_twin_passes_and_what_needs_cann_is_said_to_be_not_run(emitted):
    table, checker, equal, air, kernels, built, npu = AscendTarget().verify(emitted.folder, emitted.manifest, emitted.cases)
    assert (table.name, table.status, table.figure) == ("legality table", "passed", 0)
    assert "2 fused attentions, 0 norms and 0 rotary embeddings against the table for Ascend910B3" in table.detail
    assert (checker.status, equal.name, equal.status) == ("passed", "verify twin equals pruned model", "passed")
    assert equal.limit == 2e-3
    # Not zero: half precision went through.
    assert equal.figure is not None and 1e-6 < equal.figure < 2e-3
    assert (built.name, built.status, npu.name, npu.status) == ("CANN", "not run", "NPU", "not run")
    for one, name in ((air, "GE model"), (kernels, "kernels")):
        assert (one.name, one.status) == (name, "not run") and "tilecut toolchain install ascend" in one.detail
    assert "./build_on_cann.sh --no-run" in built.detail and "Ascend910B3" in built.detail
    assert "./build_on_cann.sh" in npu.detail and "ref/" in npu.detail


def test_a_twin_of_another_model_fails(emitted):
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    other = capture(randomise(TinyEncoder(), seed=1), example)
    given = inputs(2, 9)
    rungs = AscendTarget().verify(emitted.folder, emitted.manifest, [make_case(given, other.run(given))])
    assert rungs[2].status == "failed"
    assert rungs[2].figure is not None and rungs[2].figure > 2e-2


def test_a_node_that_the_table_forbids_fails(emitted):
    (table, *_) = AscendTarget("Ascend310P3").verify(emitted.folder, emitted.manifest, emitted.cases[:1])
    assert (table.status, table.figure) == ("failed", 2) and "num_key_value_heads 0" in table.detail


@pytest.mark.parametrize(
    ("change", "files", "problem"),
    [
        ({"sparse_mode": 3}, (ATC_MODEL,), "graph/verify.onnx is no twin of graph/model_atc.onnx"),
        # The twin names its function by an overload, which still says 0.
        ({"sparse_mode": 3}, (ATC_MODEL, VERIFY_MODEL), "graph/verify.onnx is no twin of graph/model_atc.onnx"),
        ({"pre_tokens": 0}, (ATC_MODEL,), "graph/verify.onnx is no twin of graph/model_atc.onnx"),
        ({"sparse_mode": 7}, (ATC_MODEL, VERIFY_MODEL), "the sparse mode"),
        ({"num_heads": 3, "num_key_value_heads": 2}, (ATC_MODEL,), "the heads of one KV head"),
    ],
)
def test_an_altered_file_fails(emitted, change, files, problem, tmp_path):
    folder = shutil.copytree(emitted.folder, tmp_path / "copy")
    for name in files:
        model = onnx.load(str(folder / name), load_external_data=False)
        for one in [a for a in flash(model)[0].attribute if a.name in change]:
            one.i = change[one.name]
        onnx.save(model, str(folder / name))
    # With hashes that fit.
    manifest = replace(emitted.manifest, files=list_files(folder))
    (table, *_) = AscendTarget().verify(folder, manifest, emitted.cases[:1])
    assert (table.status, table.figure) == ("failed", 1) and problem in table.detail


@pytest.mark.parametrize("chip", CHIPS)
def test_a_chip_is_named_in_the_script(emitted, chip, tmp_path):
    target = AscendTarget(chip)
    assert target.soc == chip
    write_build_script(tmp_path, target.npu)
    assert f"soc='{chip}'\n" in (tmp_path / SCRIPT).read_text()


def test_lowering_is_one_visible_tuple():
    fused = lambda family: (LowerRmsNorm(family), LowerRotary(family), LowerAttention(family))
    assert AscendTarget().fusions == (FuseRmsNorm(), FuseRotary())
    assert AscendTarget().lowering == (UnpackAttention(), *fused("a2"))
    half = AscendTarget("Ascend310P3,fp16").lowering
    assert half == (UnpackAttention(), ComputeIn(torch.float16), FoldCasts(), *fused("p310"))


@pytest.mark.parametrize(
    ("words", "problem", "nearest"),
    [
        ("Ascend310P3,bf16", "the cube of Atlas inference products .* has no bfloat16", "ascend:Ascend310P3,fp16"),
        ("Ascend310B1,bf16", "has no bfloat16", "ascend:Ascend310B1,fp16"),
        ("bf16", "written in float32 or float16", "ascend:Ascend910B3,fp16"),
        ("Ascend910B7", "unknown Ascend chip", "Ascend910B"),
        ("Ascend310B1,fused", "Atlas 200I/500 A2 inference products .* have no fused attention", "ascend:Ascend910B3,fused"),
    ],
)
def test_an_illegal_wish_is_one_error(words, problem, nearest):
    with pytest.raises(ConfigError, match=f"{problem}.*{nearest}"):
        AscendTarget(words)


class Attends(nn.Module):
    """One attention: q [B, N, S, D] on one KV head."""

    def forward(self, q, kv):
        return nn.functional.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)


@pytest.mark.parametrize(
    ("chip", "heads", "width", "limit"),
    [
        ("fused", 4, 20, r"got 20; wanted PromptFlashAttention .*multiples of 16 up to 512; the nearest is 32"),
        ("fused", 100, 16, r"got 100 heads on 1, 100; wanted .*up to 64 heads for one KV head; the nearest is 2 KV heads"),
        ("a3,fused", 4, 20, r"got 20; wanted FusedInferAttentionScore .*multiples of 16 .*; the nearest is 32"),
        ("950,fp16,fused", 100, 16, r"got 100 heads on 1.*FusedInferAttentionScore .*64 heads.*; the nearest is 2 KV"),
    ],
)
def test_a_fused_attention_that_was_asked_for_and_cannot_be_is_one_error(chip, heads, width, limit, tmp_path):
    example = {"q": torch.randn(2, heads, 5, width), "kv": torch.randn(2, 1, 5, width)}
    graph = capture(Attends(), example, {"q": {0: "batch", 2: "length"}, "kv": {0: "batch", 2: "length"}})
    with pytest.raises(LoweringError, match=f"attention_default: no fused attention; {limit}"):
        emit(AscendTarget(chip), graph, tmp_path / "never")
    # Without the wish it is written out, and the report says why.
    made = emit(AscendTarget(chip.replace("fused", "fp32").replace("fp16,", "")), graph, tmp_path / "written")
    assert made.written.facts["fused_attention"] == 0 and made.lowered.refusals


def test_a_file_in_fp16_holds_fp16_weights(tmp_path):
    target = AscendTarget("fp16")
    made = emit(target, encoder_graph(), tmp_path / "half")
    model = onnx.load(str(made.folder / ATC_MODEL), load_external_data=False)
    products = {name for n in model.graph.node if n.op_type == "MatMul" for name in n.input}
    kinds = {t.data_type for t in model.graph.initializer if t.name in products}
    assert kinds == {TensorProto.FLOAT16}
    assert made.written.facts["dtype"] == "float16" and made.written.facts["fused_attention"] == 2
    _, _, equal, *_ = target.verify(made.folder, made.manifest, made.cases)
    assert equal.status == "passed" and equal.figure is not None and 1e-5 < equal.figure < 2e-3


@pytest.mark.parametrize(
    ("chip", "written"), [("Ascend910B3", ["kernels", "air"]), ("Ascend310P3", []), ("Ascend950", ["kernels", "air"])]
)
def test_the_private_environments_write_what_the_chip_takes(chip, written, tmp_path, monkeypatch):
    wrote = []
    where = "tilecut_targets.ascend.target."
    monkeypatch.setattr(f"{where}is_installed", lambda name: True)
    monkeypatch.setattr(f"{where}compile_kernels", lambda graph, npu, folder: wrote.append("kernels") or {"kernels": []})

    def refuse(graph, npu, folder):
        wrote.append("air")
        raise LoweringError("write_air", "no converter")

    monkeypatch.setattr(f"{where}write_air", refuse)
    made = emit(AscendTarget(chip), mlp_graph(), tmp_path / "made")
    assert wrote == written
    for name in ("kernels", "air"):
        assert (name in written) == ("nothing of it is for" not in str(made.written.facts[name]))
    if written:
        # The file for ATC stands without it.
        assert made.written.facts["air"] == {"not written": "write_air: no converter"}


def test_what_cannot_be_checked_is_not_run_and_says_why(emitted, tmp_path, monkeypatch):
    folder = shutil.copytree(emitted.folder, tmp_path / "copy")
    (folder / "graph" / "model.air").touch()

    def refuse(folder, manifest, cases):
        raise LoweringError("evaluate_air", "an operator that the evaluator does not know")

    monkeypatch.setattr("tilecut_targets.ascend.target.check_air", refuse)
    rungs = {r.name: r for r in AscendTarget().verify(folder, emitted.manifest, emitted.cases[:1])}
    assert rungs["GE model"].status == "not run" and "the evaluator does not know" in rungs["GE model"].detail


def test_an_npu_needs_the_built_model(emitted):
    for device in (None, "npu:1"):
        with pytest.raises(ArtifactError, match="om/model.om is not built yet; run ./build_on_cann.sh"):
            load(emitted.folder, device=device)
    with pytest.raises(ArtifactError, match="runs on an NPU; got device='cuda'"):
        load(emitted.folder, device="cuda")


def test_heads_that_the_op_does_not_take_are_written_out(tmp_path):
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    graph = capture(randomise(TinyEncoder(heads=(2,), neurons=(20,), width=6)), example)
    made = emit(AscendTarget(), graph, tmp_path / "narrow")
    assert (made.written.facts["attention"], made.written.facts["fused_attention"]) == (1, 0)
    limit = "PromptFlashAttention takes head widths in multiples of 16 up to 512; got 6; the nearest is 16"
    assert made.lowered.refusals[0].why == limit
    twin = onnx.load(str(made.folder / VERIFY_MODEL))
    assert not twin.functions and "Softmax" in {n.op_type for n in twin.graph.node}
    _, _, equal, *_ = AscendTarget().verify(made.folder, made.manifest, made.cases)
    assert equal.status == "passed"
    assert equal.figure is not None and equal.figure < 1e-5


class Padded(nn.Module):
    """Attention over rows x [B, S, 32] of which the first `lengths` [B] are real."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, lengths):
        keep = torch.arange(x.shape[1])[None] < lengths[:, None]
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])
        return self.out(out.transpose(1, 2).flatten(2))


def test_lengths_are_an_input_of_the_op_and_no_mask_is_made(tmp_path):
    example = {"x": torch.randn(2, 7, 32), "lengths": torch.tensor([7, 3])}
    graph = capture(randomise(Padded()), example, {"x": {0: "batch", 1: "sequence"}, "lengths": {0: "batch"}})
    made = emit(AscendTarget(), graph, tmp_path / "lengths")
    (node,) = [n for n in onnx.load(str(made.folder / ATC_MODEL)).graph.node if npu_ops.is_fused(n)]
    assert [bool(name) for name in node.input] == [True, True, True, False, False, False, True]
    assert npu_ops.illegal(node, "a2") is None and "the lengths of keys" in str(npu_ops.illegal(node, "p310"))
    twin = {r.name: r for r in AscendTarget().verify(made.folder, made.manifest, made.cases)}
    assert twin["verify twin equals pruned model"].status == "passed"
    session = load(made.folder, device="reference")
    # Longer than the rows are: nothing is hidden.
    x = torch.randn(3, 5, 32)
    for lengths in ([5, 2, 1], [9, 5, 4]):
        got = session.run({"x": x.numpy(), "lengths": np.array(lengths)})
        want = graph.run({"x": x, "lengths": torch.tensor(lengths)})
        (a,), (b,) = got.values(), want.values()
        assert np.abs(a - b.numpy()).max() < 2e-3 * b.abs().max()


def test_a_model_without_attention_and_with_small_weights_is_written_too(tmp_path):
    made = emit(AscendTarget(), mlp_graph(neurons=2), tmp_path / "mlp")
    _, _, equal, *_ = AscendTarget().verify(made.folder, made.manifest, made.cases)
    assert equal.status == "passed"
    case = made.cases[0]
    got = load(made.folder, device="reference").run(case.inputs)
    assert case.error(got) < 1e-5
