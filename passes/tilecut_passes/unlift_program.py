"""Turn an exported program, whose weights are inputs, into a module that holds its weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import cast

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from tilecut_passes.flat_forward import PAST, PRESENT, path_name
from tilecut_passes.graph import Returns, place_tensor
from tilecut_runtime.errors import CaptureError


@dataclass(frozen=True)
class Unlifted:
    """The module, names of its inputs' nodes and of its outputs, the structure it returned, and its tensors by name."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    returns: Returns
    tensors: dict[str, Tensor]
    notes: list[str]


def unlift_program(program: ExportedProgram, name: str) -> Unlifted:
    """Turn a functional program into a module with get_attr nodes; `name` is the model's, for messages.

    Raises:
        CaptureError: the program changes state, or holds what is neither a tensor nor a call.
    """
    signature = program.graph_signature
    if changed := [s for s in signature.output_specs if s.kind not in (OutputKind.USER_OUTPUT,)]:
        raise CaptureError(
            name,
            f"forward changes {changed[0].target or getattr(changed[0].arg, 'name', 'a tensor')} in place",
            fix="a compiled graph has no state: return the value instead",
        )
    root = nn.Module()
    graph = fx.Graph()
    inputs: list[str] = []
    made: dict[str, fx.Node] = {}
    specs = {s.arg.name: s for s in signature.input_specs}
    calls: list[fx.Node] = []
    tensors: list[tuple[fx.Node, str, Tensor]] = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            calls.append(node)
            continue
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(spec.arg, TensorArgument):
                made[node.name] = graph.placeholder(node.name)
                made[node.name].meta = dict(node.meta)
                inputs.append(node.name)
            elif not isinstance(spec.arg, ConstantArgument):
                raise CaptureError(
                    name, f"input {node.name} is neither a tensor nor a constant", got=type(spec.arg).__name__
                )
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            target = cast(str, spec.target)
            held = program.state_dict[target] if target in program.state_dict else program.constants[target]
            if node.users:
                tensors.append((node, target, cast(Tensor, held)))
        else:
            raise CaptureError(name, f"input {node.name} of kind {spec.kind.name} is not supported")
    for node, target, value in tensors:
        if hasattr(fx.GraphModule, taken := target.split(".")[0]):
            raise CaptureError(
                name, f"it calls a part {taken!r}, which torch.fx keeps for itself", got=target, fix="rename that part"
            )
        place_tensor(root, target, value)
        made[node.name] = graph.get_attr(target)
        made[node.name].meta = dict(node.meta)
    for node in calls:
        if node.op == "output":
            continue
        if node.op != "call_function":
            raise CaptureError(
                name,
                f"the exported graph holds a {node.op} node ({node.name})",
                fix="export has left a sub-graph: avoid torch.cond and torch.no_grad blocks inside forward",
            )
        made[node.name] = graph.node_copy(node, lambda n: made[n.name])
    outputs, returns, kept, notes = _outputs(program, name, inputs)
    graph.output(tuple(made[n] for n in kept))
    module = fx.GraphModule(root, graph, class_name=name)
    return Unlifted(module, tuple(inputs), outputs, returns, {target: value for _, target, value in tensors}, notes)


def _outputs(
    program: ExportedProgram, model: str, inputs: list[str]
) -> tuple[tuple[str, ...], Returns, list[str], list[str]]:
    """Names of the tensor outputs, the structure they come in, their nodes, and a note for each that is dropped."""
    specs = program.graph_signature.output_specs
    spec = program.call_spec.out_spec
    assert spec is not None
    structure = pytree.tree_unflatten(list(range(len(specs))), spec)
    paths = {leaf: path for path, leaf in pytree.tree_flatten_with_path(structure)[0] if isinstance(leaf, int)}
    returns: Returns = (
        "tensor"
        if isinstance(structure, int)
        else "tuple"
        if isinstance(structure, tuple | list) and not hasattr(structure, "keys")
        else "mapping"
    )
    names, nodes, notes = [], [], []
    for i, one in enumerate(specs):
        name = path_name(paths[i]) or "output"
        name = f"output_{name}" if name[0].isdigit() else name
        if name.startswith(f"{PAST}_"):
            name = name.replace(PAST, PRESENT, 1)
        if isinstance(one.arg, TensorArgument):
            # An artifact's tensors have one name each.
            candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
            free = next(n for n in candidates if n not in [*inputs, *names])
            if free != name:
                notes.append(f"capture: output {name} is called {free}, since another tensor has its name")
            names.append(free)
            nodes.append(one.arg.name)
        elif not (isinstance(one.arg, ConstantArgument) and one.arg.value is None):
            notes.append(f"capture: output {name} is no tensor and was dropped")
    if not names:
        raise CaptureError(model, "forward returns no tensor")
    return tuple(names), returns, nodes, notes
