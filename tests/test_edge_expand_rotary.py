"""RotaryEmbedding's tables get as many rows as its input: what the exporter writes runs for one row only."""

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from checks import randomise, run_onnx
from tilecut_passes.capture import capture
from tilecut_targets.edge.expand_rotary import expand_rotary
from tilecut_targets.edge.onnx_ops import PORTABLE_OPSET
from tilecut_targets.write_onnx import write_onnx
from zoo import ZOO


@pytest.fixture(scope="module")
def graph():
    return capture(randomise(ZOO["llama_gqa"].build()))


def batch(rows):
    ids = torch.randint(0, 99, (rows, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_rows_of_the_input_become_rows_of_the_tables(graph, tmp_path):
    counts = []
    write_onnx(graph, tmp_path / "a.onnx", PORTABLE_OPSET, finish=lambda model: counts.append(expand_rotary(model)))
    assert counts == [4]
    assert [n.op_type for n in ir.load(tmp_path / "a.onnx").graph].count("Expand") >= 2
    for rows in (1, 5):
        (got,), (want,) = run_onnx(tmp_path / "a.onnx", batch(rows)).values(), graph.run(batch(rows)).values()
        assert got.shape == want.shape
    inputs = batch(5)
    (got,), (want,) = run_onnx(tmp_path / "a.onnx", inputs).values(), graph.run(inputs).values()
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))


def test_without_it_onnxruntime_refuses_two_rows(graph, tmp_path):
    write_onnx(graph, tmp_path / "a.onnx", PORTABLE_OPSET)
    session = ort.InferenceSession(str(tmp_path / "a.onnx"))
    feeds = {k: v.numpy() for k, v in batch(2).items()}
    with pytest.raises(Exception, match="cos_cache"):
        session.run(None, feeds)


def test_a_model_without_the_op_is_left_alone(tmp_path):
    graph = capture(randomise(ZOO["gpt2"].build()))
    write_onnx(graph, tmp_path / "a.onnx", PORTABLE_OPSET)
    model = ir.load(tmp_path / "a.onnx")
    before = len(model.graph)
    assert expand_rotary(model) == 0 and len(model.graph) == before
