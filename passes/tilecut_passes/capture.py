"""Capture a model as a `Graph` through `torch.export`.

The model is exported in eval mode with gradients on (training IR), functionalised by `run_decompositions({})` where it
writes in place (that keeps linear, layer_norm and attention whole), and its parameters become get_attr nodes under the
names of the caller's `state_dict`. Tensors are shared with the model, never copied or changed.

Dynamic sizes are first asked for by name, so that every input's batch is one symbol; when the model refuses that
(it fixes a size, or relates two), torch decides which sizes can stay dynamic. The remedy used is in `Graph.notes`.
"""

from __future__ import annotations

import io
import logging
import operator
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from tilecut_passes.canonicalize import Canonicalize
from tilecut_passes.example_inputs import DynamicDims, ExampleInputs, inputs_from_caller, inputs_from_config
from tilecut_passes.graph import Graph, size_of
from tilecut_passes.run_passes import run_passes
from tilecut_passes.unlift_program import unlift_program
from tilecut_runtime.errors import CaptureError
from tilecut_runtime.manifest import DimRange

# Composite ops that run_decompositions writes in terms of others.
SPELLED_OUT = (torch.ops.aten.einsum.default, torch.ops.aten.tensordot.default, torch.ops.aten.bilinear.default)

log = logging.getLogger("tilecut.capture")


def capture(model: nn.Module, example_inputs: Any = None, dynamic_shapes: DynamicDims | None = None) -> Graph:
    """Capture `model`.

    Args:
        example_inputs: a tensor, a tuple of tensors in forward's order, or a dict by name (constants allowed); None
            makes them from a Hugging Face model's config.
        dynamic_shapes: input name -> dimension -> name of the dynamic size; None guesses (see `example_inputs`).

    Raises:
        CaptureError: the model cannot be exported; names the line of the model's code where export stopped.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError("capture", "not a PyTorch model", got=type(model).__name__, wanted="an nn.Module")
    if example_inputs is None and dynamic_shapes is not None:
        raise CaptureError(type(model).__name__, "dynamic_shapes without example_inputs", fix="give both, or neither")
    example = (
        inputs_from_config(model)
        if example_inputs is None
        else inputs_from_caller(model, example_inputs, dynamic_shapes)
    )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example.tensors = {k: v.to(device) for k, v in example.tensors.items()}
    with _eval_mode(model), quiet_torch():
        program, notes = _export(model, example)
    graph = _to_graph(model, program, example)
    graph.notes += notes
    run_passes(graph, [Canonicalize()])
    return graph


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def quiet_torch() -> Iterator[None]:
    """torch logs and prints whole graphs and tracebacks before it raises; the exception says what matters."""
    loggers = [
        logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
    ]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(printed):
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            yield
    finally:
        log.debug("printed during export:\n%s", printed.getvalue())
        for one, level in zip(loggers, levels):
            one.setLevel(level)


def _export(model: nn.Module, example: ExampleInputs) -> tuple[ExportedProgram, list[str]]:
    names = dict.fromkeys(name for dims in example.dynamic.values() for name in dims.values())
    dims = {name: Dim(name, min=1, max=example.limits.get(name)) for name in names}
    named = {k: {d: dims[n] for d, n in example.dynamic.get(k, {}).items()} for k in example.tensors}
    free = {k: dict.fromkeys(example.dynamic.get(k, {}), Dim.AUTO) for k in example.tensors}
    constants = dict.fromkeys(example.constants)
    kwargs = {**example.tensors, **example.constants}
    failure: Exception | None = None
    for remedy, shapes in ((None, named), ("dynamic sizes left to torch (Dim.AUTO)", free)):
        try:
            program = torch.export.export(model, (), kwargs, dynamic_shapes={**shapes, **constants}, strict=False)
            if not _is_canonical(program):
                program = program.run_decompositions({})
        # torch.export raises whatever the model's own code raises.
        except Exception as e:
            failure = failure or e
            continue
        first_line = str(failure).strip().splitlines()[0] if failure else ""
        return program, [f"capture: {remedy}, because named ones were refused: {first_line[:200]}"] if remedy else []
    assert failure is not None
    raise _capture_error(model, failure) from failure


def _is_canonical(program: ExportedProgram) -> bool:
    """Whether no op writes in place, no sub-graph is called, and no op is spelled in a language of its own.

    Tracing a program again to make it so takes seconds.
    """
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    return all(
        not op._schema.is_mutable and op not in SPELLED_OUT
        if isinstance(op, torch._ops.OpOverload)
        else getattr(op, "__module__", "") == "_operator"
        for op in calls
    ) and not any(n.op == "get_attr" for n in program.graph.nodes)


def _capture_error(model: nn.Module, failure: Exception) -> CaptureError:
    lines = [line.strip() for line in str(failure).strip().splitlines() if line.strip()]
    what = f"{type(failure).__name__}: {lines[0] if lines else 'no message'}"
    fix = "pass example_inputs that fit forward, or rewrite that line"
    if "DataDependent" in type(failure).__name__ or "data-dependent" in str(failure):
        fix = "the line decides on a tensor's value: use torch.where, torch.cond or a mask instead of if, .item() or .tolist()"
    return CaptureError(
        f"{type(model).__name__}", f"torch.export stopped at {_users_line(failure)}: {what[:400]}", fix=fix
    )


def _users_line(failure: Exception) -> str:
    """File, line and source of the deepest frame that is neither torch's nor ours."""
    ours, torchs = Path(__file__).parent, Path(torch.__file__).parent
    frames = [
        f
        for f in traceback.extract_tb(failure.__traceback__)
        if not f.filename.startswith("<")
        and torchs not in Path(f.filename).parents
        and ours not in Path(f.filename).parents
        and Path(f.filename).name != "contextlib.py"
    ]
    if not frames:
        # Constraint violations are raised after tracing; torch names the user's line in the message, when it can.
        named = re.search(r'File "([^"]+)", line (\d+)', str(failure))
        return f"{named[1]}:{named[2]}" if named else "a check inside torch itself"
    return f"{frames[-1].filename}:{frames[-1].lineno} `{(frames[-1].line or '').strip()}`"


def _to_graph(model: nn.Module, program: ExportedProgram, example: ExampleInputs) -> Graph:
    name = type(model).__name__
    unlifted = unlift_program(program, name)
    # The exported inputs are the flattened keyword arguments, in the order in which they were given.
    given = dict(zip(program.graph_signature.user_inputs, [*example.tensors, *example.constants]))
    inputs = tuple(given[node_name] for node_name in unlifted.inputs)
    dims, ranges = _dims(unlifted.module.graph, inputs, program, example)
    by_tensor = {id(value): target for target, value in unlifted.tensors.items()}
    aliases = {
        k: by_tensor[id(v)] for k, v in _state(model).items() if k not in unlifted.tensors and id(v) in by_tensor
    }
    return Graph(unlifted.module, inputs, unlifted.outputs, unlifted.returns, dims, ranges, aliases, unlifted.notes)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _dims(
    graph: fx.Graph, inputs: tuple[str, ...], program: ExportedProgram, example: ExampleInputs
) -> tuple[dict[sympy.Symbol, str], dict[str, DimRange]]:
    """Names and ranges of the symbols in the inputs' shapes."""
    dims: dict[sympy.Symbol, str] = {}
    for name, node in zip(inputs, [n for n in graph.nodes if n.op == "placeholder"], strict=True):
        for d, size in enumerate(node.meta["val"].shape):
            expression = size_of(size)
            if isinstance(expression, sympy.Symbol) and expression not in dims:
                wanted = example.dynamic.get(name, {}).get(d, f"{name}_{d}")
                dims[expression] = wanted if wanted not in dims.values() else f"{wanted}_{name}"
    ranges = {}
    for symbol, name in dims.items():
        limits = program.range_constraints.get(symbol)
        upper = (
            None
            if limits is None or not isinstance(limits.upper, int | sympy.Integer) or limits.upper > 1 << 40
            else int(limits.upper)
        )
        # torch never says less than 2, because it takes 0 and 1 for constants; more is the model's own demand.
        lower = int(limits.lower) if limits is not None and isinstance(limits.lower, int | sympy.Integer) else 1
        ranges[name] = DimRange(lower if lower > 2 else 1, upper)
    return dims, ranges
