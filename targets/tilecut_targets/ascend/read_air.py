"""Read a GE model (.air), the graph that CANN's ATC takes: a protobuf message of operators, their attributes and weights.

Only the parts that say what a model computes are described here; protobuf skips the rest. No torch_npu is needed.

Source: ge_ir.proto, as torch_npu 2.13.0 carries it (field numbers and `DataType`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from torch import Tensor

from tilecut_runtime.errors import ArtifactError

# message -> {field: (number, type)}; "*" repeats. A map is a list of entries with a key and a value.
MESSAGES = {
    "ModelDef": {"name": (1, "string"), "graph": (7, "GraphDef*")},
    "GraphDef": {"name": (1, "string"), "op": (6, "OpDef*")},
    "OpDef": {
        "name": (1, "string"),
        "type": (2, "string"),
        "input": (5, "string*"),
        "attr": (10, "AttrEntry*"),
        "output_desc": (34, "TensorDescriptor*"),
    },
    "AttrEntry": {"key": (1, "string"), "value": (2, "AttrDef")},
    "AttrDef": {
        "list": (1, "ListValue"),
        "s": (2, "bytes"),
        "i": (3, "int64"),
        "f": (4, "float"),
        "b": (5, "bool"),
        "t": (12, "TensorDef"),
        "dt": (15, "int64"),
    },
    "ListValue": {"s": (2, "bytes*"), "i": (3, "int64*"), "f": (4, "float*"), "b": (5, "bool*")},
    "TensorDef": {"desc": (1, "TensorDescriptor"), "data": (2, "bytes")},
    "TensorDescriptor": {"name": (1, "string"), "dtype": (2, "int32"), "shape": (3, "ShapeDef")},
    "ShapeDef": {"dim": (1, "int64*")},
}
# `DataType` of the message.
DTYPES = {
    1: torch.float32,
    2: torch.float16,
    3: torch.int8,
    4: torch.uint8,
    5: torch.int16,
    7: torch.int32,
    8: torch.int64,
    11: torch.bool,
    12: torch.float64,
    27: torch.bfloat16,
}


@dataclass(frozen=True)
class Operator:
    """One node. `inputs` are "name:output", "" for one that is left out; attributes are numbers, bytes, lists or a tensor."""

    name: str
    type: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any] = field(repr=False)
    # Shapes of the outputs, -1 where dynamic.
    shapes: tuple[tuple[int, ...], ...] = ()


def read_air(path: Path) -> list[Operator]:
    """The operators of a model's graph, in their order.

    Raises:
        ArtifactError: the file is no GE model of one graph.
    """
    model = _model_class()()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as e:
        raise ArtifactError(str(path), f"not a GE model ({e})", fix="compile the model again") from e
    if len(model.graph) != 1:
        raise ArtifactError(str(path), "not a GE model", got=f"{len(model.graph)} graphs", wanted="one")
    return [_operator(op, path) for op in model.graph[0].op]


def _operator(op: Any, path: Path) -> Operator:
    attributes = {entry.key: _attribute(entry.value, op.name, path) for entry in op.attr}
    shapes = tuple(tuple(one.shape.dim) for one in op.output_desc)
    # An input ":-1" is an order between two operators and carries nothing.
    inputs = tuple(name for name in op.input if not name.endswith(":-1"))
    return Operator(op.name, op.type, inputs, attributes, shapes)


def _attribute(value: Any, name: str, path: Path) -> Any:
    kind = value.WhichOneof("value")
    if kind == "t":
        return _tensor(value.t, name, path)
    if kind == "list":
        return next((list(held) for _, held in value.list.ListFields()), [])
    return None if kind is None else getattr(value, kind)


def _tensor(held: Any, name: str, path: Path) -> Tensor:
    dtype, shape = DTYPES.get(held.desc.dtype), list(held.desc.shape.dim)
    if dtype is None:
        raise ArtifactError(str(path), f"constant {name} has an unknown type", got=held.desc.dtype)
    flat = torch.frombuffer(bytearray(held.data), dtype=dtype) if held.data else torch.empty(0, dtype=dtype)
    if flat.numel() != torch.Size(shape).numel():
        raise ArtifactError(str(path), f"constant {name} is damaged", got=f"{flat.numel()} numbers", wanted=shape)
    return flat.reshape(shape)


def write_operators(operators: list[Operator], path: Path) -> None:
    """Write a graph, so that a model can be made by hand."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    model = _model_class()()
    graph = model.graph.add()
    for one in operators:
        op = graph.op.add(name=one.name, type=one.type, input=one.inputs)
        for shape in one.shapes:
            op.output_desc.add().shape.dim.extend(shape)
        for key, value in one.attributes.items():
            entry = op.attr.add(key=key)
            if isinstance(value, Tensor):
                entry.value.t.desc.dtype = codes[value.dtype]
                entry.value.t.desc.shape.dim.extend(value.shape)
                entry.value.t.data = bytes(value.contiguous().flatten().view(torch.uint8).numpy()) if value.numel() else b""
            elif isinstance(value, list):
                entry.value.list.i.extend(value)
            else:
                # bool is an int.
                kind = {bool: "b", int: "i", float: "f", bytes: "s"}[type(value)]
                setattr(entry.value, kind, value)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _model_class() -> Any:
    """The class of ModelDef, made of MESSAGES."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="tilecut/ge_ir.proto", package="ge.proto", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        if name == "AttrDef":
            message.oneof_decl.add(name="value")
        for label, (number, kind) in fields.items():
            made = message.field.add(name=label, number=number)
            made.label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.removesuffix("*")
            if kind in MESSAGES:
                made.type, made.type_name = kinds.TYPE_MESSAGE, f".ge.proto.{kind}"
            else:
                made.type = getattr(kinds, f"TYPE_{kind.upper()}")
            if name == "AttrDef":
                made.oneof_index = 0
    # A pool of its own: a process that has torch_npu loaded knows these names already.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # type: ignore[attr-defined]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ge.proto.ModelDef"))
