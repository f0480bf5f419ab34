"""Capture a model as a `Graph` through `torch.export`.

The model is exported in eval mode with gradients on (training IR), functionalised by `run_decompositions({})` where it
writes in place (that keeps linear, layer_norm and attention whole), and its parameters become get_attr nodes under the
names of the caller's `state_dict`. Tensors are shared with the model, never copied or changed.

Dynamic sizes are first asked for by name, so that every input's batch is one symbol; when the model refuses that
(it fixes a size, or relates two), the remedies of `export_model` are tried. The one used is in `Graph.notes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tilecut_passes.canonicalize import Canonicalize
from tilecut_passes.example_inputs import (
    PAST_SEQUENCE,
    TOTAL,
    DynamicDims,
    ExampleInputs,
    inputs_from_caller,
    inputs_from_config,
)
from tilecut_passes.export_model import export_model
from tilecut_passes.find_hiding import find_hiding
from tilecut_passes.flat_forward import flat_forward, states
from tilecut_passes.graph import Graph, size_of, sizes_of, symbols_of
from tilecut_passes.run_passes import run_passes
from tilecut_passes.unlift_program import unlift_program
from tilecut_runtime.errors import CaptureError
from tilecut_runtime.manifest import DimRange


def capture(model: nn.Module, example_inputs: Any = None, dynamic_shapes: DynamicDims | None = None) -> Graph:
    """Capture `model`.

    Args:
        example_inputs: a tensor, a tuple of tensors in forward's order, or a dict by name (constants, structures of
            tensors and key-value caches allowed); None makes them from a Hugging Face model's config.
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
    # torch.export takes one tensor given twice for one input.
    example.tensors = {k: v.to(device, copy=True) for k, v in example.tensors.items()}
    names = [*example.tensors, *example.constants]
    with _eval_mode(model), _masks_as_given(), flat_forward(model, example.nested, names):
        program, notes = export_model(model, example.tensors, example.constants, example.dynamic, example.limits)
    graph = _to_graph(model, program, example)
    graph.notes += [*example.notes, *notes, *_fixed(graph, example)]
    tied = _tie_sizes(graph, example)
    run_passes(graph, [Canonicalize()])
    if tied:
        graph.propagate()
        run_passes(graph, [Canonicalize()])
    graph.hiding, graph.unclear = find_hiding(graph)
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
def _masks_as_given() -> Iterator[None]:
    """torch's transformer layers look into a mask, whether it is causal, for a hint to themselves; a trace has no numbers."""
    layers = torch.nn.modules.transformer
    kept = layers._detect_is_causal_mask
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        layers._detect_is_causal_mask = kept


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
    return Graph(
        unlifted.module,
        inputs,
        unlifted.outputs,
        unlifted.returns,
        dims,
        ranges,
        aliases,
        states(inputs, unlifted.outputs),
        unlifted.notes,
        example_sizes={name: size for name, size in example.sizes.items() if name in ranges},
    )


def _fixed(graph: Graph, example: ExampleInputs) -> list[str]:
    """A note for every size that was to be dynamic and that the model fixes."""
    fixed = {
        name: size
        for given, node in zip(graph.inputs, graph.placeholders, strict=True)
        for d, name in example.dynamic.get(given, {}).items()
        if isinstance(size := node.meta["val"].shape[d], int)
    }
    return [f"capture: the model takes no other {name} than {size}" for name, size in fixed.items()]


def _tie_sizes(graph: Graph, example: ExampleInputs) -> bool:
    """Give sizes of one name one symbol, where export left several; returns whether it did.

    A mask over past and present is as long as both together. What said so in the program were run-time assertions.
    """
    sizes: dict[str, Any] = {}
    for (_, _, name), size in _named_sizes(graph, example).items():
        sizes.setdefault(name, size)
    if {TOTAL, PAST_SEQUENCE, "sequence"} <= sizes.keys():
        sizes[TOTAL] = sizes[PAST_SEQUENCE] + sizes["sequence"]
    tied = False
    for node, input_name in zip(graph.placeholders, graph.inputs, strict=True):
        value = node.meta["val"]
        names = example.dynamic.get(input_name, {})
        shape = [s if isinstance(s, int) else sizes.get(names.get(d, ""), s) for d, s in enumerate(value.shape)]
        if [size_of(s) for s in shape] != [size_of(s) for s in value.shape]:
            with graph.fake_mode():
                node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
            tied = True
    used = {symbol for node in graph.placeholders for s in sizes_of(node.meta["val"]) for symbol in symbols_of(s)}
    for symbol in graph.dims.keys() - used:
        graph.ranges.pop(graph.dims.pop(symbol))
    return tied


def _named_sizes(graph: Graph, example: ExampleInputs) -> dict[tuple[str, int, str], Any]:
    """The symbolic sizes of the inputs by input, dimension and wanted name."""
    return {
        (name, d, example.dynamic[name][d]): size
        for name, node in zip(graph.inputs, graph.placeholders, strict=True)
        for d, size in enumerate(node.meta["val"].shape)
        if not isinstance(size, int) and d in example.dynamic.get(name, {})
    }


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
            wanted = example.dynamic.get(name, {}).get(d, f"{name}_{d}")
            if not isinstance(expression, sympy.Symbol):
                # A size that the model takes only in multiples.
                wanted = f"{wanted}_part"
            for symbol in sorted(symbols_of(expression) - dims.keys(), key=str):
                dims[symbol] = wanted if wanted not in dims.values() else f"{wanted}_{name}"
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
        # A decoder that has read nothing has an empty past.
        least = 0 if name == PAST_SEQUENCE else 1
        ranges[name] = DimRange(lower if lower > 2 else least, upper)
    return dims, ranges
