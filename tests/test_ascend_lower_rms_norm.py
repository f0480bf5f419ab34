"""CANN's RmsNorm: graphs as text, one refusal for each reason, and whole models as ONNX for every family of chips."""

import onnx
import pytest
import torch
from torch import nn

from checks import emit, op_names, randomise, run_onnx
from norm_models import MODELS, llama
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.graph import arguments, source, value_of
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.ascend import npu_norms
from tilecut_targets.ascend.lower_rms_norm import LowerRmsNorm, fused_rms_norm
from tilecut_targets.ascend.target import ATC_MODEL, VERIFY_MODEL, AscendTarget


@pytest.fixture(scope="module", autouse=True)
def no_private_environments():
    """As on a machine without them, whatever this one has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilecut_targets.ascend.target.is_installed", lambda name: False)
        yield


class Norms(nn.Module):
    """Norms of several kinds, one behind the other."""

    def __init__(self):
        super().__init__()
        self.exact, self.default, self.other = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-5)
        self.bare, self.plane = nn.RMSNorm(8, eps=1e-6, elementwise_affine=False), nn.RMSNorm([5, 8], eps=1e-6)

    def forward(self, x):
        return self.plane(self.bare(self.other(self.default(self.exact(x)))))


@pytest.fixture(scope="module")
def norms():
    return capture(randomise(Norms()), torch.randn(2, 5, 8), {"x": {0: "batch"}})


def lowered(graph, *options):
    made = graph.copy()
    (record,) = run_passes(made, [LowerRmsNorm(*options)])
    return made, record.rewrites


def test_before_and_after(norms):
    graph, count = lowered(norms)
    assert (op_names(norms), count) == (" ".join(["rms_norm"] * 5), 2)
    assert op_names(graph) == "rms_norm rms_norm rms_norm rms_norm rms_norm"
    assert [n.target is npu_norms.rms_norm for n in graph.nodes if n.op == "call_function"] == [1, 0, 0, 1, 0]
    exact, bare = (n for n in graph.nodes if n.target is npu_norms.rms_norm)
    assert exact.args[1:] == (source(exact, 1), 1e-6) and bare.args[1:] == (None, 1e-6)
    assert LowerRmsNorm()(graph) == 0


def test_the_refusals_name_what_is_kept(norms):
    graph, _ = lowered(norms)
    default, other, plane = (r.why for r in graph.refusals)
    assert "got 1.19209e-07" in default and "got 1e-05" in other and "the last dimension; got 2 dimensions" in plane


def test_in_the_program_of_torch_npu_any_epsilon_goes(norms):
    graph, count = lowered(norms, "a2", "air")
    made = [n for n in graph.nodes if n.target is fused_rms_norm]
    assert count == 4 and [n.args[2] for n in made] == [1e-6, torch.finfo(torch.float32).eps, 1e-5, 1e-6]
    inputs = {"x": torch.randn(3, 5, 8)}
    assert largest_error(norms.run(inputs), graph.run(inputs)) < 1e-6


def test_reasons_are_given_once(norms):
    graph, count = lowered(norms, "b310")
    assert count == 0 and op_names(graph) == op_names(norms)
    absent, plane = sorted(r.why for r in graph.refusals)
    assert "have no fused RMS norm in an .onnx file" in absent and "(3 more like it)" in absent
    assert "2 dimensions" in plane


def shaped(model, **options):
    return capture(model(**options))


@pytest.mark.parametrize(
    ("chip", "norms", "rotary"),
    [
        ("Ascend910B3", 5, 4),
        ("Ascend910B3,fp16", 5, 4),
        ("Ascend310P3", 5, 0),
        ("Ascend310B1", 0, 0),
        ("Ascend910_9391", 0, 0),
        ("Ascend950PR_9589", 0, 0),
        ("Ascend910A", 0, 0),
    ],
)
def test_a_llama_on_every_family_of_chips(chip, norms, rotary, tmp_path):
    graph, target = shaped(llama, rms_norm_eps=1e-6), AscendTarget(chip)
    written = emit(target, graph, tmp_path / "artifact")
    facts = written.written.facts
    assert (facts["fused_norms"], facts["fused_rotary"]) == (norms, rotary)
    nodes = [n.op_type for n in onnx.load(str(written.folder / ATC_MODEL)).graph.node]
    assert nodes.count("NPURmsNorm") == norms and nodes.count("NPURotaryPositionEmbedding") == rotary
    assert ("ReduceMean" in nodes, "Neg" in nodes) == (not norms, not rotary)
    for batch, length in ((1, 1), (3, 21)):
        inputs = make_inputs(graph, batch, length, seed=length)
        want, got = (x["logits"][inputs["attention_mask"] != 0] for x in (
            graph.run(inputs), run_onnx(written.folder / VERIFY_MODEL, inputs)))  # fmt: skip
        assert largest_error({"y": want}, {"y": got}) < target.tolerance
    legality = target.verify(written.folder, written.manifest, written.cases)[0]
    assert legality.status == "passed" and f"{norms} norms and {rotary} rotary embeddings" in legality.detail


@pytest.mark.parametrize("name", ["gemma2", "phi3", "neox"])
def test_models_with_the_epsilon_of_atcs_reader_have_no_norm_left(name, tmp_path):
    model, norms, rotary, _ = MODELS[name]
    graph = capture(model())
    written = emit(AscendTarget(), graph, tmp_path / "artifact")
    eps = {arguments(n)["eps"] for n in written.lowered.nodes if n.target is torch.ops.aten.rms_norm.default}
    fused = norms if not eps else 0
    assert eps <= {1e-5}
    assert (written.written.facts["fused_norms"], written.written.facts["fused_rotary"]) == (fused, rotary)
    inputs = make_inputs(graph, 2, 9, seed=1, ragged=False)
    assert largest_error(graph.run(inputs), run_onnx(written.folder / VERIFY_MODEL, inputs)) < AscendTarget().tolerance


def test_another_epsilon_is_written_out_in_onnx_and_the_report_says_why(tmp_path):
    graph = shaped(llama, rms_norm_eps=1e-5)
    written = emit(AscendTarget(), graph, tmp_path / "artifact")
    assert written.written.facts["fused_norms"] == 0 and written.written.facts["fused_rotary"] == 4
    (refusal,) = written.lowered.refusals
    assert refusal.by == "LowerRmsNorm" and "sets epsilon 1e-06" in refusal.why and "(4 more like it)" in refusal.why
    inputs = make_inputs(graph, 2, 9, seed=1, ragged=False)
    assert largest_error(graph.run(inputs), run_onnx(written.folder / VERIFY_MODEL, inputs)) < AscendTarget().tolerance


def test_a_wrong_epsilon_in_the_file_fails_the_legality_rung(tmp_path):
    target = AscendTarget()
    written = emit(target, shaped(llama, rms_norm_eps=1e-6, layers=1), tmp_path / "artifact")
    model = onnx.load(str(written.folder / ATC_MODEL), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "NPURmsNorm")
    node.attribute[0].f = 1e-5
    onnx.save(model, str(written.folder / ATC_MODEL))
    legality = target.verify(written.folder, written.manifest, written.cases)[0]
    assert (legality.status, legality.figure) == ("failed", 1) and "the epsilon" in legality.detail


def test_a_norms_value_keeps_its_type(norms):
    for made, _ in (lowered(norms), lowered(norms, "a2", "air")):
        assert {value_of(n).dtype for n in made.nodes if n.op == "call_function"} == {torch.float32}
