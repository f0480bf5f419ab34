"""Graph to `torch.export` program: what every target's writer starts from."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tilecut_passes.export_model import Shapes, try_remedies
from tilecut_passes.graph import Graph, size_at
from tilecut_runtime.errors import LoweringError, first_line


def example_inputs(graph: Graph, sizes: dict[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs for the graph at given dynamic sizes (each defaults to a small prime of its own, within its range).

    Integers are 0 or 1, which every embedding and mask accepts; masks hide nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    primes = dict(zip(graph.dims.values(), (2, 7, 11, 5, 13, 3, 17)))
    at = {**{name: graph.ranges[name].nearest(size) for name, size in primes.items()}, **(sizes or {})}
    out = {}
    for spec in graph.input_specs():
        shape = [size_at(s, at) for s in spec.shape]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            out[spec.name] = torch.randn(shape, generator=generator).to(dtype)
        elif spec.name in graph.hiding:
            out[spec.name] = torch.zeros(shape, dtype=dtype)
        elif "mask" in spec.name:
            out[spec.name] = torch.ones(shape, dtype=dtype)
        else:
            out[spec.name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return out


def named_module(graph: Graph) -> nn.Module:
    """The graph as a module with keyword inputs that returns a dict; its tensors keep their names."""
    module = _Named(type(graph.module).forward, graph.inputs, graph.outputs)
    for held, add in (
        (graph.module._parameters, module.register_parameter),
        (graph.module._buffers, module.register_buffer),
        (graph.module._modules, module.add_module),
    ):
        for name, value in held.items():
            add(name, value)  # type: ignore[arg-type]
    return module


class _Named(nn.Module):
    """`forward` has the inputs' names as its signature, which is what torch.export matches dynamic shapes with."""

    def __init__(self, run: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]):
        super().__init__()

        def forward(*args: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
            given = signature.bind(*args, **inputs)
            return dict(zip(outputs, run(self, *given.args)))

        signature = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in inputs]
        )
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


def export_program(graph: Graph, positional: bool = False) -> ExportedProgram:
    """Export a graph again, with its dynamic sizes under their names.

    Args:
        positional: take inputs by position and return a tuple, as ONNX export wants; else by name, returning a dict.

    Raises:
        LoweringError: torch.export refuses the graph.
    """
    inputs = example_inputs(graph)
    # A size that is an expression of others gets a name of its own; the trace finds the relation again.
    dynamic = {
        spec.name: {
            d: s if s.isidentifier() else f"{spec.name}_{d}" for d, s in enumerate(spec.shape) if isinstance(s, str)
        }
        for spec in graph.input_specs()
    }

    def export(shapes: Shapes, deferred: bool) -> ExportedProgram:
        if positional:
            module, args, kwargs, dims = graph.module, tuple(inputs.values()), {}, tuple(shapes.values())
        else:
            module, args, kwargs, dims = named_module(graph), (), inputs, shapes
        return torch.export.export(
            module,
            args,
            kwargs,
            dynamic_shapes=dims,  # type: ignore[arg-type]
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )

    program, _, failure = try_remedies(export, list(inputs), dynamic, graph.ranges)
    if program is None:
        raise LoweringError("export_program", f"torch.export refused the graph: {first_line(failure)}") from failure
    return program
