"""What an edge artifact is timed against: forms of the dense model that all give its numbers, and peers that fail."""

from typing import Any

import onnx
import pytest
import torch
from torch import nn

from checks import encoder_graph, mlp_graph, op_names, randomise
from tilecut_passes.capture import capture
from tilecut_runtime.attention import attention
from tilecut_runtime.timing import PRUNED
from tilecut_targets.edge.contend import DENSE, EXPORTED, ONNXSCRIPT, OPTIMIZED, contend, plain_session
from tilecut_targets.edge.forms import Forms
from tilecut_targets.edge.target import EdgeTarget, count_ops
from tilecut_targets.peers import optimize, optimize_for_ort


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("contend")


@pytest.fixture(scope="module")
def made(scratch):
    # Any file will do as the artifact, also one that is about to be written.
    return contend(EdgeTarget().fusing, Forms(), encoder_graph(), scratch / "dense.onnx", 1, scratch)


def test_every_form_runs_or_says_why_not(made):
    assert list(made.runners) + list(made.failed) == [PRUNED, DENSE, EXPORTED, OPTIMIZED, ONNXSCRIPT]
    assert not made.failed


def first(outputs: Any) -> Any:
    """The first output: peers give theirs by name."""
    return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]


@pytest.mark.parametrize("shape", [(1, 1), (4, 19)])
def test_every_form_gives_the_dense_models_numbers(made, shape):
    ids = torch.randint(0, 50, shape)
    mask = (torch.arange(shape[1]) < shape[1] // 2 + 1).long().expand(shape[0], -1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    want = encoder_graph().run(inputs)["hidden"][mask != 0]
    for name, run in made.runners.items():
        got = torch.from_numpy(first(run({k: v.numpy() for k, v in inputs.items()})))[mask != 0]
        assert torch.allclose(got, want, atol=1e-4), name


def test_the_dense_form_takes_the_artifacts_path_and_the_export_does_not(made, scratch):
    dense, exported = count_ops(scratch / "dense.onnx"), count_ops(scratch / "exported.onnx")
    assert (dense["Attention"], dense["Sum"], dense["BiasGelu"], dense["Softmax"]) == (2, 4, 2, 0)
    assert (exported["Attention"], exported["Softmax"]) == (0, 2)
    domains = {n.domain for n in onnx.load(str(scratch / "exported.onnx")).graph.node}
    assert domains == {""}


def test_the_peers_optimizers_changed_the_file(made, scratch):
    plain = count_ops(scratch / "exported.onnx")
    assert count_ops(scratch / "optimized.onnx") != plain
    fused = count_ops(scratch / "onnxscript.onnx")
    assert (plain["BiasGelu"], fused["BiasGelu"]) == (0, 2)


def test_the_dense_graph_is_not_changed(made):
    assert "scaled_dot_product_attention" in op_names(encoder_graph())


class Attends(nn.Module):
    """A model that calls the op itself."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_peer_that_breaks_is_a_result_with_its_reason_and_the_others_still_run(tmp_path):
    graph = capture(randomise(Attends()), torch.randn(2, 5, 8))
    # The peers cannot write where a folder is.
    (tmp_path / "optimized.onnx").mkdir()
    (tmp_path / "onnxscript.onnx").mkdir()
    made = contend(EdgeTarget().fusing, Forms(), graph, tmp_path / "dense.onnx", 1, tmp_path)
    assert list(made.runners) == [PRUNED, DENSE, EXPORTED]
    assert list(made.failed) == [OPTIMIZED, ONNXSCRIPT]
    assert all("IsADirectoryError: " in why for why in made.failed.values())
    x = torch.randn(3, 7, 8)
    runners: Any = made.runners
    for name in (DENSE, EXPORTED):
        got = torch.from_numpy(first(runners[name]({"x": x.numpy()})))
        assert torch.allclose(got, graph.run({"x": x})["output"], atol=1e-5), name


def test_the_target_offers_them(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("tilecut_targets.edge.target.contend", lambda *given: called.append(given))
    EdgeTarget().contenders(mlp_graph(), tmp_path, None, 3, tmp_path / "scratch")  # type: ignore[arg-type]
    ((passes, forms, _, artifact, threads, scratch, manifest),) = called
    assert manifest is None
    assert (passes, forms, artifact) == (EdgeTarget().fusing, Forms(), tmp_path / "model.onnx")
    assert (threads, scratch) == (3, tmp_path / "scratch")


def test_a_broken_file_is_not_optimised_silently(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    for rewrite in (optimize, optimize_for_ort):
        with pytest.raises(Exception, match=r"pars|Protobuf|protobuf"):
            rewrite(tmp_path / "broken.onnx", tmp_path / "out.onnx")
    with pytest.raises(Exception, match=r"pars|Protobuf|protobuf"):
        plain_session(tmp_path / "broken.onnx", 1)
