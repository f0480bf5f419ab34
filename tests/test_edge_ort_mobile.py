"""target="edge:ort-mobile": a .ort file beside the ONNX file, which the session loads."""

import numpy as np
import onnxruntime as ort
import pytest

from checks import bert_graph, emit, text_batch
from tilecut_runtime.errors import LoweringError
from tilecut_runtime.session import load
from tilecut_targets.edge.ort_mobile import OrtMobileTarget, convert_to_ort
from tilecut_targets.edge.target import EdgeTarget


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return emit(OrtMobileTarget(), bert_graph(), tmp_path_factory.mktemp("mobile") / "a")


def test_the_session_loads_the_ort_file(made):
    assert made.written.entry == {"model": "model.ort", "onnx": "model.onnx", "operators": "required_operators.config"}
    # A flatbuffer of onnxruntime's says so.
    assert (made.folder / "model.ort").read_bytes()[4:8] == b"ORTM"
    inputs = {k: v.numpy() for k, v in text_batch(2, 9).items()}
    (made.folder / "model.onnx").rename(made.folder / "away.onnx")
    try:
        assert load(made.folder).run(inputs)["pooler_output"].shape == (2, 32)
    finally:
        (made.folder / "away.onnx").rename(made.folder / "model.onnx")


def test_the_onnx_file_is_the_edge_targets(made, tmp_path):
    edge = emit(EdgeTarget(), bert_graph(), tmp_path / "edge")
    assert (made.folder / "model.onnx").read_bytes() == (edge.folder / "model.onnx").read_bytes()


def test_both_files_give_the_same_numbers(made):
    inputs = {k: v.numpy() for k, v in text_batch(3, 11).items()}
    one, two = (ort.InferenceSession(str(made.folder / n)).run(None, inputs) for n in ("model.ort", "model.onnx"))
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(one, two, strict=True))


def test_the_needed_ops_are_listed_without_traces_of_this_machine(made):
    text = (made.folder / "required_operators.config").read_text(encoding="utf-8")
    assert "com.microsoft;1;Attention,BiasGelu" in text and str(made.folder) not in text
    assert all(line.count(";") == 2 for line in text.splitlines())
    # Layouts of one processor, and the fusion that is slow on CPUs.
    assert "com.microsoft.nchwc" not in text and "SkipLayerNormalization" not in text
    assert str(made.folder).encode() not in (made.folder / "model.ort").read_bytes()


def test_what_cannot_be_converted_is_one_error(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no protobuf")
    with pytest.raises(LoweringError, match=r"cannot save b\.ort"):
        convert_to_ort(tmp_path / "a.onnx", tmp_path / "b.ort")
