"""target="edge" on a pruned BERT: one fused node a layer, the graph's numbers on ragged batches, and honest rungs."""

import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import bert_graph, emit, groups_of, mlp_graph, text_batch
from tilecut.make_cases import make_case
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.reference import Case
from tilecut_targets.edge.lower_attention import LowerAttention
from tilecut_targets.edge.lower_bias_gelu import LowerBiasGelu
from tilecut_targets.edge.lower_cached_attention import LowerCachedAttention
from tilecut_targets.edge.lower_cross_attention import LowerCrossAttention
from tilecut_targets.edge.lower_residual import LowerResidual
from tilecut_targets.edge.lower_rms_norm import LowerRmsNorm
from tilecut_targets.edge.lower_rotary import LowerRotary
from tilecut_targets.edge.target import EdgeTarget, count_ops
from tilecut_targets.unpack_attention import UnpackAttention

KEPT = {
    "encoder.layer.0.attention:heads": [1, 3],
    "encoder.layer.1.attention:heads": [0, 2, 3],
    "encoder.layer.0:neurons": range(3, 40),
    "encoder.layer.1:neurons": range(0, 48, 4),
}


@pytest.fixture(scope="module")
def pruned():
    """Layers of 2 and 3 heads of 8 under a hidden width of 32, 37 and 12 neurons: nothing divides anything."""
    graph = bert_graph().copy()
    run_passes(graph, [Prune(PrunePlan.keep_all(graph, groups_of(graph)).keeping(KEPT))])
    return graph


@pytest.fixture(scope="module")
def emitted(pruned, tmp_path_factory):
    return emit(EdgeTarget(), pruned, tmp_path_factory.mktemp("edge") / "artifact")


@pytest.fixture(scope="module")
def run(emitted):
    """The file in a session as a user would open it."""
    session = ort.InferenceSession(emitted.folder / "model.onnx")
    names = [o.name for o in session.get_outputs()]
    return lambda inputs: dict(
        zip(names, map(torch.from_numpy, session.run(None, {k: v.numpy() for k, v in inputs.items()})), strict=True)
    )


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_every_layer_has_one_fused_attention_with_its_own_heads(emitted):
    model = onnx.load(str(emitted.folder / "model.onnx"))
    fused = [n for n in model.graph.node if n.domain == "com.microsoft" and "Attention" in n.op_type]
    assert [n.op_type for n in fused] == ["Attention"] * 2
    assert [attributes(n)["num_heads"] for n in fused] == [2, 3]
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    assert [weights[n.input[1]] for n in fused] == [[32, 3 * 2 * 8], [32, 3 * 3 * 8]]
    counts = count_ops(emitted.folder / "model.onnx")
    assert not {"Softmax", "Erf", "Gelu"} & set(counts)
    assert (counts["BiasGelu"], counts["Sum"], counts["LayerNormalization"]) == (2, 4, 5)


def test_the_facts_are_the_files(emitted):
    facts = emitted.written.facts
    counts = count_ops(emitted.folder / "model.onnx")
    assert emitted.written.entry == {"model": "model.onnx"}
    assert (facts["attention"], facts["fused_attention"]) == (2, 2)
    assert facts["onnx_nodes"] == sum(counts.values())
    assert facts["onnx_ops"] == dict(counts)


@settings(max_examples=25)
@given(batch=st.integers(1, 8), length=st.integers(1, 256), seed=st.integers(0, 10**6))
def test_ragged_batches_of_any_size_give_the_pruned_models_numbers(pruned, run, batch, length, seed):
    inputs = text_batch(batch, length, seed)
    want, got = pruned.run(inputs), run(inputs)
    rows = inputs["attention_mask"] != 0
    assert list(got) == list(want) == ["last_hidden_state", "pooler_output"]
    assert got["last_hidden_state"].isfinite().all()
    assert largest_error({"y": want["last_hidden_state"][rows]}, {"y": got["last_hidden_state"][rows]}) < 1e-4
    assert largest_error({"y": want["pooler_output"]}, {"y": got["pooler_output"]}) < 1e-4


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 512), (8, 256)])
def test_the_smallest_and_the_largest_batch_run(pruned, run, shape):
    inputs = text_batch(*shape)
    rows = inputs["attention_mask"] != 0
    want, got = pruned.run(inputs)["last_hidden_state"], run(inputs)["last_hidden_state"]
    assert largest_error({"y": want[rows]}, {"y": got[rows]}) < 1e-4


def test_padding_does_not_reach_the_real_positions(run):
    inputs = text_batch(3, 20)
    rows = inputs["attention_mask"] != 0
    other = {**inputs, "input_ids": torch.where(rows, inputs["input_ids"], 98 - inputs["input_ids"])}
    one, two = run(inputs)["last_hidden_state"], run(other)["last_hidden_state"]
    assert torch.equal(one[rows], two[rows])
    assert not torch.equal(one[~rows], two[~rows])


def test_a_right_artifact_passes_every_rung(emitted):
    checker, equal = EdgeTarget().verify(emitted.folder, emitted.manifest, emitted.cases)
    assert (checker.name, checker.status) == ("onnx checker", "passed")
    assert (equal.name, equal.status, equal.limit) == ("artifact equals pruned model", "passed", 1e-4)
    assert equal.figure is not None and 0 < equal.figure < 1e-5
    assert "1x1" in equal.detail and "3x5" in equal.detail


def test_an_artifact_of_another_model_fails(emitted):
    dense = bert_graph()
    inputs = text_batch(2, 9)
    _, equal = EdgeTarget().verify(emitted.folder, emitted.manifest, [make_case(inputs, dense.run(inputs))])
    assert equal.status == "failed"
    assert equal.figure is not None and equal.figure > 1e-2


def test_one_wrong_number_among_many_fails(emitted):
    first, last = emitted.cases
    outputs = {k: v.copy() for k, v in last.outputs.items()}
    outputs["last_hidden_state"][0, -1, -1] += 1e-2 * abs(outputs["last_hidden_state"]).max()
    _, equal = EdgeTarget().verify(emitted.folder, emitted.manifest, [first, Case(last.inputs, outputs, last.valid)])
    assert equal.status == "failed"


def test_a_file_that_is_no_onnx_does_not_pass(emitted, tmp_path):
    (tmp_path / "model.onnx").write_bytes((emitted.folder / "model.onnx").read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"not valid ONNX.*([Pp]ars|Protobuf|protobuf)"):
        EdgeTarget().verify(tmp_path, emitted.manifest, emitted.cases)


def test_lowering_is_one_visible_tuple():
    assert EdgeTarget().lowering == (
        UnpackAttention(), LowerCachedAttention(), LowerCrossAttention(), LowerResidual(), LowerRmsNorm(), LowerRotary(),
        LowerAttention(packable=True), LowerAttention(packable=False), LowerBiasGelu(),
    )  # fmt: skip


def test_a_model_without_attention_is_written_too(tmp_path):
    graph = mlp_graph()
    made = emit(EdgeTarget(), graph, tmp_path / "mlp")
    assert (made.written.facts["attention"], made.written.facts["fused_attention"]) == (0, 0)
    assert [r.status for r in EdgeTarget().verify(made.folder, made.manifest, made.cases)] == ["passed", "passed"]
