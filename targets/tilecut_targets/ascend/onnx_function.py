"""The nodes of a model-local ONNX function, as they are made."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import onnx
from onnx import helper


class OnnxFunction:
    """Nodes so far; every call names what it makes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node; returns the name of its output."""
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: object, dtype: type = np.int64) -> str:
        """A constant."""
        return self.add("Constant", [], name, value=onnx.numpy_helper.from_array(np.array(value, dtype)))

    def attribute(self, name: str, of: str, kind: int = onnx.AttributeProto.INT, field: str = "value_int") -> str:
        """One of the function's attributes, as a tensor."""
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(onnx.AttributeProto(name=field, ref_attr_name=of, type=cast(Any, kind)))
        self.nodes.append(node)
        return name
