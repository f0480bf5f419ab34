"""target="edge:portable": standard ops alone, and a refusal of anything else."""

import onnx
import onnx_ir as ir
import pytest

from checks import bert_graph, emit
from tilecut_runtime.errors import LoweringError
from tilecut_targets.edge.portable import PortableTarget, check_standard
from tilecut_targets.edge.target import EdgeTarget


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return emit(PortableTarget(), bert_graph(), tmp_path_factory.mktemp("portable") / "a")


def test_the_file_holds_one_domain_and_no_functions(made):
    model = onnx.load(str(made.folder / "model.onnx"))
    assert {n.domain for n in model.graph.node} == {""} and not model.functions
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
    ops = made.written.facts["ops"]
    assert (ops["Attention"], ops["LayerNormalization"], ops["Gelu"], ops["Sum"]) == (2, 5, 2, 4)
    assert "Softmax" not in ops


def test_a_vendors_op_is_refused_by_name(tmp_path):
    folder = emit(EdgeTarget(), bert_graph(), tmp_path / "a").folder
    with pytest.raises(LoweringError, match=r"not standard ONNX; got com\.microsoft::Attention, com\.microsoft::BiasGelu"):
        check_standard(ir.load(folder / "model.onnx"))


def test_a_function_is_refused(made):
    model = ir.load(made.folder / "model.onnx")
    body = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    function = ir.Function("local", "F", graph=body, attributes=[])
    model.functions[function.identifier()] = function
    with pytest.raises(LoweringError, match="not standard ONNX; got .*local"):
        check_standard(model)
