"""Convert an exported program to a GE model by torchair's converters. Runs inside "ascend-air".

Asked: {"program": a .pt2 file with its weights, "inputs": the names of its inputs in order, "air": the file to write,
"soc": the chip}. Answers {"inputs": the names that are left, in the model's order, "operators": {type: count}}.

torchair converts what its compiler is given, an fx graph of ATen ops with its own decompositions applied. What asks for
a device or for CANN is told what it would hear from them; torchair's last step, a call of CANN that saves the
graph, is replaced by writing the same protobuf message here. `aten.gelu` goes through torch_npu's `npu_gelu`, since
torchair's own converter drops the choice between erf and tanh.
"""

import collections
import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.pop("ASCEND_HOME_PATH", None)

import torch
import torch_npu
import torch_npu.npu.utils
import torchair
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch.fx.experimental.proxy_tensor import make_fx
from torchair._ge_concrete_graph import compat_ir, fx2ge_converter
from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef
from torchair.configs.compiler_config import CompilerConfig
from torchair.npu_fx_compiler import _get_merged_decompositions, get_compiler

assert torchair


class SavedHere:
    """torchair's native part, with an `export` that keeps the serialized model."""

    def __init__(self, native):
        self.native, self.saved = native, b""

    def __getattr__(self, name):
        return getattr(self.native, name)

    def export(self, serialized, options):
        """Keep the message; `options` say where CANN would have written it."""
        self.saved = serialized


def main() -> None:
    """Answer on stdout what was asked on stdin."""
    asked = json.load(sys.stdin)
    air = Path(asked["air"])
    pretend(asked["soc"])
    native = fx2ge_converter._torchair = SavedHere(fx2ge_converter._torchair)
    program = torch.export.load(asked["program"])
    config = CompilerConfig()
    config.export.export_mode = True
    config.export.export_path_dir, config.export.export_name = str(air.parent), air.stem
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["val"] for node in placeholders]
    names, given = inputs_of(program, placeholders, asked["inputs"])
    config.export.weight_name = {id(tensor): name for name, tensor in zip(names, given) if name not in asked["inputs"]}
    graph = decomposed(program, fakes, names, config)
    with tracing(TracingContext(fakes[0].fake_mode)), torch.no_grad():
        runner = get_compiler(config)(graph, fakes).runner
        # How torchair says that it is done.
        with contextlib.suppress(fx2ge_converter.ExportSuccess):
            runner(*given)
    model = ModelDef()
    model.ParseFromString(native.saved)
    (ge_graph,) = model.graph
    air.write_bytes(model.SerializeToString(deterministic=True))
    data = sorted((op for op in ge_graph.op if op.type == "Data"), key=lambda op: op.attr["index"].i)
    count = collections.Counter(op.type for op in ge_graph.op)
    print(json.dumps({"inputs": [op.name for op in data], "operators": dict(sorted(count.items()))}))


def pretend(soc: str) -> None:
    """Answer what torch_npu and torchair ask of a device."""
    torch_npu.npu.get_device_name = lambda *given: soc
    torch_npu.npu.current_device = torch_npu.npu.utils.current_device = lambda: 0
    fx2ge_converter.initialize_graph_engine = lambda *given: None
    # Whether the CANN that is installed has an operator; "" says yes, and ATC will be asked again.
    compat_ir.is_cann_compat = lambda *given, **named: ""
    # On a machine with an NPU the inputs lie on it.
    fx2ge_converter.set_host_tensor = lambda data: None


def inputs_of(program, placeholders, inputs):
    """The names and values of a program's placeholders: weights as they are, inputs as ones of some small size."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    stored = {**program.constants, **program.state_dict}
    left = iter(inputs)
    names, given = [], []
    for node in placeholders:
        if node.name in held:
            names.append(node.name)
            given.append(stored[held[node.name]].detach().contiguous())
        else:
            fake = node.meta["val"]
            names.append(next(left))
            given.append(torch.ones([s if isinstance(s, int) else s.node.hint for s in fake.shape], dtype=fake.dtype))
    return names, given


def decomposed(program, fakes, names, config):
    """The program's graph in the ops that torchair has converters for, its placeholders under their names."""
    table = _get_merged_decompositions(config)
    table[torch.ops.aten.gelu.default] = lambda x, *, approximate="none": torch.ops.npu.npu_gelu(x, approximate=approximate)
    run = torch.fx.Interpreter(program.graph_module).run
    with fakes[0].fake_mode, enable_python_dispatcher(), torch.no_grad():
        graph = make_fx(run, decomposition_table=table)(*fakes)
    for node, name in zip([node for node in graph.graph.nodes if node.op == "placeholder"], names, strict=True):
        node.target = node.name = name
    # A traced function has its stack in every node, with the paths of this machine.
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)
    graph.recompile()
    return graph


main()
