"""What an ONNX file multiplies by weights: every spelling that is found, and what is left alone."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tilecut_targets.edge.onnx_products import Tensors, find_products, find_tables

W, B = np.ones((4, 6), np.float32), np.ones(6, np.float32)


def tensors(*nodes, outputs=("y",), **held):
    """The tensors of a graph of nodes "Op in in -> out", with x [?, 4] as its input; attributes after a bar."""
    made = []
    for text, attributes in nodes:
        left, out = text.split(" -> ")
        op, *inputs = left.split()
        domain = "com.microsoft" if op in ("BiasGelu", "Attention") else None
        made.append(helper.make_node(op, inputs, out.split(), domain=domain, **attributes))
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    return Tensors(helper.make_model(graph))


def found(*nodes, outputs=("y",), **held):
    """Each product as (x, weight, transposed, bias, gelu, output)."""
    return [
        (p.x, p.weight, p.transposed, p.bias, p.gelu, p.output)
        for p in find_products(tensors(*nodes, outputs=outputs, **held))
    ]


@pytest.mark.parametrize(
    ("nodes", "want"),
    [
        ([("MatMul x w -> y", {})], ("x", "w", False, None, False, "y")),
        ([("MatMul x w -> m", {}), ("Add m b -> y", {})], ("x", "w", False, "b", False, "y")),
        ([("MatMul x w -> m", {}), ("Add b m -> y", {})], ("x", "w", False, "b", False, "y")),
        ([("MatMul x w -> m", {}), ("BiasGelu m b -> y", {})], ("x", "w", False, "b", True, "y")),
        ([("Transpose v -> t", {"perm": [1, 0]}), ("MatMul x t -> y", {})], ("x", "v", True, None, False, "y")),
        ([("Gemm x w b -> y", {})], ("x", "w", False, "b", False, "y")),
        ([("Gemm x v b -> y", {"transB": 1})], ("x", "v", True, "b", False, "y")),
        ([("Gemm x v -> y", {"transB": 1})], ("x", "v", True, None, False, "y")),
        # The sum is no bias: it is not [6], is read twice, or is an output itself.
        ([("MatMul x w -> m", {}), ("Add m c -> y", {})], ("x", "w", False, None, False, "m")),
        ([("MatMul x w -> m", {}), ("Add m m -> y", {})], ("x", "w", False, None, False, "m")),
        ([("MatMul x w -> m", {}), ("Mul m b -> y", {})], ("x", "w", False, None, False, "m")),
    ],
)
def test_spellings(nodes, want):
    assert found(*nodes, w=W, v=W.T.copy(), b=B, c=np.ones((1, 6), np.float32)) == [want]


def test_a_product_that_is_an_output_keeps_its_bias_apart():
    nodes = [("MatMul x w -> m", {}), ("Add m b -> y", {})]
    assert found(*nodes, outputs=("y", "m"), w=W, b=B) == [("x", "w", False, None, False, "m")]


@pytest.mark.parametrize(
    ("node", "held"),
    [
        (("MatMul w x -> y", {}), {"w": W}),
        (("MatMul x x -> y", {}), {"w": W}),
        (("MatMul x w -> y", {}), {"w": np.ones((2, 4, 6), np.float32)}),
        (("MatMul x w -> y", {}), {"w": W.astype(np.float64)}),
        (("MatMul x w -> y", {}), {"w": np.ones((4, 0), np.float32)}),
        (("Gemm x w -> y", {"alpha": 0.5}), {"w": W}),
        (("Gemm x w -> y", {"transA": 1}), {"w": W}),
        (("Gemm x w c -> y", {}), {"w": W, "c": np.ones((3, 6), np.float32)}),
        (("Attention x w b -> y", {"num_heads": 1, "qkv_hidden_sizes": [2, 2, 2]}), {"w": W, "b": B}),
        (("Attention x w b m past -> y", {"num_heads": 1}), {"w": W, "b": B}),
    ],
)
def test_left_alone(node, held):
    assert found(node, **held) == []


def test_an_attentions_projection_is_a_product():
    (p,) = find_products(tensors(("Attention x w b -> y", {"num_heads": 1}), w=W, b=B))
    assert (p.x, p.weight, p.bias) == ("x", "w", "b") and p.attention is p.nodes[0]


def test_tables_are_what_rows_are_gathered_from():
    nodes = [
        ("Gather w i -> a", {}),
        ("Gather w j -> b2", {"axis": 0}),
        ("Gather v i -> c", {"axis": 1}),
        ("Gather x i -> d", {}),
        ("Gather b i -> e", {}),
    ]
    held = tensors(*nodes, w=W, v=W, b=B)
    assert {name: len(nodes) for name, nodes in find_tables(held).items()} == {"w": 2}


def test_a_shared_weight_is_found_wherever_it_is_read():
    nodes = [("MatMul x w -> m", {}), ("Transpose w -> t", {"perm": [1, 0]}), ("MatMul m t -> y", {})]
    assert found(*nodes, w=W) == [("x", "w", False, None, False, "m"), ("m", "w", True, None, False, "y")]
