"""Check a program's calls of torch_npu's ops against the ops themselves. Runs inside "ascend-air".

Asked: {"program": a .pt2 file, "schemas": {op: the schema that it was written by}}. Reading the file binds every argument
of every call to the real schema; then each call is made again on meta tensors, through the real meta kernel, and has to
give the shape and type that the program says. Answers {"calls": {op: n}, "faults": [text]}.
"""

import json
import os
import sys

os.environ.pop("ASCEND_HOME_PATH", None)

import torch
import torch_npu

assert torch_npu


def main() -> None:
    """Answer on stdout what was asked on stdin."""
    asked = json.load(sys.stdin)
    calls: dict[str, int] = {}
    faults = []
    for name, written in asked["schemas"].items():
        real = getattr(torch.ops.npu, name).default._schema
        if real != torch._C.parse_schema(f"npu::{written}"):
            faults.append(f"{name}: the schema is {real}")
    program = torch.export.load(asked["program"])
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", None) != "npu":
            continue
        name = node.target._schema.name.removeprefix("npu::")
        calls[name] = calls.get(name, 0) + 1
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
        first = next(one for one in args if isinstance(one, torch.Tensor))
        with first.fake_mode:
            made = node.target(*args, **kwargs)
        said = node.meta["val"]
        made, said = ([one] if isinstance(one, torch.Tensor) else one for one in (made, said))
        for one, other in zip(made, said, strict=True):
            if one.dtype != other.dtype or str(list(one.shape)) != str(list(other.shape)):
                got, wanted = f"{one.dtype} {list(one.shape)}", f"{other.dtype} {list(other.shape)}"
                faults.append(f"{node.name}: torch_npu gives {got}, the program says {wanted}")
    print(json.dumps({"calls": calls, "faults": faults}))


main()
