"""ONNX files: names, dynamic sizes, nothing of the machine that wrote them, external weights, refusals."""

import logging

import onnx
import pytest
import torch

from checks import encoder_graph, mlp_graph, run_onnx
from test_export_program import loud, with_op
from tilecut_passes.run_passes import largest_error
from tilecut_runtime.errors import LoweringError
from tilecut_targets import write_onnx as module
from tilecut_targets.write_onnx import write_onnx


def texts(batch, length):
    ids = torch.randint(0, 50, (batch, length))
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < length // 2 + 1).long().expand(batch, -1)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(encoder_graph(), made, 20)
    return made


def shapes(values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_inputs_outputs_and_dynamic_sizes_carry_the_graphs_names(path):
    graph = onnx.load(str(path)).graph
    assert shapes(graph.input) == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert shapes(graph.output) == {"hidden": ["batch", "sequence", 24], "first": ["batch", 24]}
    assert [v.type.tensor_type.elem_type for v in graph.input] == [onnx.TensorProto.INT64] * 2


def test_weights_keep_their_names_where_the_exporter_keeps_the_tensors(path):
    names = {t.name for t in onnx.load(str(path)).graph.initializer}
    assert {"embed.weight", "norms.0.weight", "norms.3.bias"} <= names


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 7), (3, 64)])
def test_the_numbers_are_the_graphs(path, shape):
    inputs = texts(*shape)
    assert largest_error(encoder_graph().run(inputs), run_onnx(path, inputs)) < 1e-5


def test_the_file_tells_nothing_of_the_machine_that_wrote_it(path):
    data = path.read_bytes()
    for trace in (b"/home", b"/tmp", b"/work", b"/usr", b"site-packages", b".py", b"Traceback", b'File "', b"forward("):
        assert trace not in data, trace
    model = onnx.load(str(path))
    assert not model.doc_string and not model.graph.doc_string and not model.metadata_props
    assert all(not n.doc_string and not n.metadata_props for n in model.graph.node)


def test_the_same_graph_gives_the_same_file_and_nothing_is_printed(tmp_path, capfd):
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    for name in ("a.onnx", "b.onnx"):
        write_onnx(mlp_graph(), tmp_path / name, 20)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert capfd.readouterr().out == ""
    assert logger.level == before


def opset(path):
    (imported,) = [o.version for o in onnx.load(str(path)).opset_import if o.domain in ("", "ai.onnx")]
    return imported


def test_the_operator_set_is_the_one_asked_for_and_the_model_returned_as_written(path, tmp_path):
    model = write_onnx(mlp_graph(), tmp_path / "m.onnx", 18)
    assert (opset(path), opset(tmp_path / "m.onnx")) == (20, 18)
    assert [n.op_type for n in model.graph] == [n.op_type for n in onnx.load(str(tmp_path / "m.onnx")).graph.node]


def external(path):
    model = onnx.load(str(path), load_external_data=False)
    return {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}


def test_weights_stay_inside_while_they_fit(path):
    assert external(path) == set()
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_weights_go_beside_the_model_when_asked(tmp_path):
    graph = mlp_graph(neurons=200)
    write_onnx(graph, tmp_path / "m.onnx", 20, external="weights.bin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "weights.bin"]
    assert external(tmp_path / "m.onnx") == {"weights.bin"}
    assert graph.tensor("up.weight").detach().numpy().tobytes()[:64] not in (tmp_path / "m.onnx").read_bytes()
    x = {"x": torch.randn(3, 12)}
    assert largest_error(graph.run(x), run_onnx(tmp_path / "m.onnx", x)) < 1e-5


def test_weights_that_do_not_fit_go_beside_the_model_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXTERNAL_DATA_BYTES", 4 * 200 * 12)
    graph = mlp_graph(neurons=200)
    write_onnx(graph, tmp_path / "m.onnx", 20)
    assert external(tmp_path / "m.onnx") == {"m.onnx.data"}
    x = {"x": torch.randn(3, 12)}
    assert largest_error(graph.run(x), run_onnx(tmp_path / "m.onnx", x)) < 1e-5


def test_ops_are_decomposed_before_export(tmp_path):
    relu = lambda x: torch.maximum(x, torch.zeros_like(x))
    graph = mlp_graph()
    write_onnx(graph, tmp_path / "m.onnx", 20, {torch.ops.aten.relu.default: relu})
    ops = [n.op_type for n in onnx.load(str(tmp_path / "m.onnx")).graph.node]
    assert "Relu" not in ops and "Max" in ops
    x = {"x": torch.randn(3, 12)}
    assert largest_error(graph.run(x), run_onnx(tmp_path / "m.onnx", x)) < 1e-5


@torch.library.custom_op("tilecut_tests::without_onnx_form", mutates_args=())
def without_onnx_form(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@torch.library.register_fake("tilecut_tests::without_onnx_form")
def _(x):
    return torch.empty_like(x)


def test_an_op_without_onnx_form_is_a_lowering_error_that_names_it(tmp_path):
    with pytest.raises(LoweringError, match=r"write_onnx: torch\.onnx\.export failed: .+") as caught:
        write_onnx(with_op(torch.ops.tilecut_tests.without_onnx_form.default), tmp_path / "m.onnx", 20)
    assert "tilecut_tests.without_onnx_form" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


def test_a_graph_that_torch_cannot_export_is_a_lowering_error_too(tmp_path):
    with pytest.raises(LoweringError, match=r"export_program: torch\.export refused the graph: RuntimeError"):
        write_onnx(with_op(loud), tmp_path / "m.onnx", 20)
