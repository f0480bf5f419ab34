"""Find what an ONNX file multiplies by weights: the products and the tables that quantization is about.

    y = x @ W (+ b)     MatMul; MatMul with an Add or a BiasGelu that nothing else reads; Gemm
    attention           com.microsoft::Attention: the packed projection of q, k and v is a product
    table[ids]          Gather of rows
W is a float32 initializer of rank 2, or one behind a Transpose. Left alone: everything else.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper


@dataclass(frozen=True)
class Product:
    """y = x @ W (+ bias), and then gelu or attention.

    Attributes:
        nodes: the nodes that say it, in the file's order.
        weight: the initializer; W is its transpose where `transposed`.
        gelu: whether the last node is BiasGelu.
        attention: the Attention whose projection this is.
    """

    nodes: tuple[NodeProto, ...]
    x: str
    weight: str
    transposed: bool
    bias: str | None = None
    gelu: bool = False
    attention: NodeProto | None = None

    @property
    def output(self) -> str:
        """What it gives, gelu or attention included."""
        return self.nodes[-1].output[0]


class Tensors:
    """The initializers of a model by name, and who reads what."""

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self.by_name = {t.name: t for t in model.graph.initializer}
        self.readers: dict[str, list[NodeProto]] = collections.defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {o.name for o in model.graph.output}
        self.transposes = {
            n.output[0]: n.input[0]
            for n in model.graph.node
            if n.op_type == "Transpose" and n.input[0] in self.by_name and list(attribute(n, "perm", [1, 0])) == [1, 0]
        }

    def matrix(self, name: str) -> tuple[str, bool] | None:
        """The float32 initializer of rank 2 behind a name, and whether it is read transposed; None for anything else."""
        source = self.transposes.get(name, name)
        tensor = self.by_name.get(source)
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type != TensorProto.FLOAT or 0 in tensor.dims:
            return None
        return source, source != name

    def array(self, name: str) -> np.ndarray:
        """An initializer's numbers."""
        return numpy_helper.to_array(self.by_name[name])

    def is_vector(self, name: str, size: int) -> bool:
        """Whether a name is a float32 initializer [size]."""
        tensor = self.by_name.get(name)
        return tensor is not None and list(tensor.dims) == [size] and tensor.data_type == TensorProto.FLOAT

    def only_reader(self, name: str) -> NodeProto | None:
        """The node that reads a value, where nothing else does."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def find_products(tensors: Tensors) -> Iterator[Product]:
    """Every product by weights, in the file's order."""
    for node in tensors.model.graph.node:
        if node.op_type in ("MatMul", "Attention") or (node.op_type == "Gemm" and _is_plain(node)):
            found = tensors.matrix(node.input[1])
        else:
            continue
        if found is None:
            continue
        weight, transposed = found
        if node.op_type == "Attention":
            if len(node.input) <= 4 and attribute(node, "qkv_hidden_sizes", None) is None and not transposed:
                yield Product((node,), node.input[0], weight, False, node.input[2], attention=node)
            continue
        if node.op_type == "Gemm":
            transposed ^= bool(attribute(node, "transB", 0))
            width = tensors.by_name[weight].dims[0 if transposed else 1]
            bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
            if bias is None or tensors.is_vector(bias, width):
                yield Product((node,), node.input[0], weight, transposed, bias)
            continue
        width = tensors.by_name[weight].dims[0 if transposed else 1]
        yield _with_bias(tensors, node, weight, transposed, width)


def _with_bias(tensors: Tensors, node: NodeProto, weight: str, transposed: bool, width: int) -> Product:
    after = tensors.only_reader(node.output[0])
    if after is not None and after.op_type in ("Add", "BiasGelu"):
        for bias in (name for name in after.input if name != node.output[0]):
            if tensors.is_vector(bias, width):
                return Product((node, after), node.input[0], weight, transposed, bias, after.op_type == "BiasGelu")
    return Product((node,), node.input[0], weight, transposed)


def _is_plain(gemm: NodeProto) -> bool:
    return attribute(gemm, "alpha", 1.0) == attribute(gemm, "beta", 1.0) == 1.0 and not attribute(gemm, "transA", 0)


def find_tables(tensors: Tensors) -> dict[str, list[NodeProto]]:
    """Initializers [V, H] of which rows are gathered, with the nodes that do."""
    found: dict[str, list[NodeProto]] = {}
    for node in tensors.model.graph.node:
        if node.op_type != "Gather" or attribute(node, "axis", 0) != 0:
            continue
        matrix = tensors.matrix(node.input[0])
        if matrix is not None and not matrix[1]:
            found.setdefault(matrix[0], []).append(node)
    return found


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """An attribute's value."""
    for a in node.attribute:
        if a.name == name:
            return onnx.helper.get_attribute_value(a)
    return default
