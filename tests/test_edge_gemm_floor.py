"""The products of a model alone: as many MACs as the model, and nothing else in the file."""

import numpy as np
import onnx
import pytest

from checks import bert_graph, encoder_graph, mlp_graph
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.count_macs import MacCounter
from tilecut_targets.edge.gemm_floor import products_of, products_runner, write_products

AT = {"batch": 2, "sequence": 9}


@pytest.mark.parametrize("make", [encoder_graph, bert_graph, mlp_graph])
def test_the_file_has_the_models_macs_and_products_only(make, tmp_path):
    graph = make()
    axes = infer(graph)
    assert write_products(graph, AT, tmp_path / "p.onnx") == MacCounter(axes, find_groups(axes), AT).total()
    model = onnx.load(str(tmp_path / "p.onnx"))
    assert {n.op_type for n in model.graph.node} == {"MatMul"}
    assert len(model.graph.node) == len(products_of(graph, AT))
    results = products_runner(tmp_path / "p.onnx", 1)({})
    assert len(results) == len(model.graph.node)
    assert all(np.isfinite(one.numpy()).all() for one in results)


def test_sizes_of_a_known_model():
    """Two layers of 2 heads of 16 on 32 wide rows, and one product of attention each way."""
    found = products_of(encoder_graph(), AT)
    assert all(programs is None or (programs % 2 == 0 and {m, k, n} <= {9, 16}) for programs, m, k, n in found)
    assert sum(programs is not None for programs, *_ in found) == 4
    assert all(m == 18 for programs, m, _, _ in found if programs is None)
