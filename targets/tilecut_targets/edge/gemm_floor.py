"""The matrix products of a model and nothing else, as one file for onnxruntime: the floor of its latency there.

Every contraction that is counted as MACs becomes a MatMul of the same sizes: [m, k] and a weight of its own, or attention's
batches of [m, k] and [k, n]. No form of the model is faster under the same runtime unless it computes less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.graph import Graph
from tilecut_runtime.reference import Arrays
from tilecut_targets.open_peers import open_session

OPSET, IR = 20, 9


def products_of(graph: Graph, at: Mapping[str, int]) -> list[tuple[int | None, int, int, int]]:
    """(programs, m, k, n) of every product at the sizes of `at`; `programs` is None for a product with a weight."""
    axes = infer(graph)
    counter = MacCounter(axes, find_groups(axes), at)
    nodes = {n.name: n for n in graph.nodes}
    found: list[tuple[int | None, int, int, int]] = []
    for term in counter.terms:
        *outer, n, k = counter.sizes_of(term, {})
        if axes.weights.isdisjoint(nodes[term.node].all_input_nodes):
            *programs, m = outer or [1]
            found.append((math.prod(programs), m, k, n))
        else:
            found.append((None, math.prod(outer), k, n))
    return found


def write_products(graph: Graph, at: Mapping[str, int], path: Path) -> int:
    """Write the file, with random weights; returns the MACs in it."""
    rng = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = []
    inputs: dict[str, onnx.ValueInfoProto] = {}
    nodes, outputs, macs = [], [], 0

    def given(shape: tuple[int, ...]) -> str:
        name = f"x_{'_'.join(map(str, shape))}"
        inputs.setdefault(name, helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    for i, (programs, m, k, n) in enumerate(products_of(graph, at)):
        macs += (programs or 1) * m * k * n
        if programs is None:
            right = f"w_{i}"
            weights.append(numpy_helper.from_array(rng.standard_normal((k, n), np.float32) * 0.05, right))
            left, shape = given((m, k)), (m, n)
        else:
            left, right, shape = given((programs, m, k)), given((programs, k, n)), (programs, m, n)
        nodes.append(helper.make_node("MatMul", [left, right], [f"y_{i}"]))
        outputs.append(helper.make_tensor_value_info(f"y_{i}", TensorProto.FLOAT, shape))
    made = helper.make_graph(nodes, "products", list(inputs.values()), outputs, weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR), str(path))
    return macs


def products_runner(path: Path, threads: int) -> Callable[[Arrays], object]:
    """A runner of the file, whatever it is given; its results are not copied."""
    session = open_session(path, threads)
    rng = np.random.default_rng(1)
    feeds = {
        one.name: ort.OrtValue.ortvalue_from_numpy(rng.standard_normal(one.shape, np.float32))
        for one in session.get_inputs()
    }
    names = [one.name for one in session.get_outputs()]
    return lambda _: session.run_with_ort_values(names, feeds)
