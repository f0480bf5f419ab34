"""Write a lowered graph as an ONNX file through torch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass

from tilecut_passes.graph import Graph
from tilecut_runtime.errors import LoweringError, first_line
from tilecut_targets import translate_grouped_matmul, translate_sort
from tilecut_targets.export_program import export_program

# Of ops that torch's exporter has no form for.
TRANSLATIONS = {**translate_grouped_matmul.TRANSLATIONS, **translate_sort.TRANSLATIONS}

# Above this, weights go beside the model: a protobuf file ends at 2 GB.
EXTERNAL_DATA_BYTES = 1_800_000_000


def write_onnx(
    graph: Graph,
    path: Path,
    opset: int,
    decompose: Mapping[Any, Callable[..., Any]] | None = None,
    external: str | None = None,
    finish: Callable[[ir.Model], object] | None = None,
) -> ir.Model:
    """Export `graph` to `path`; dynamic sizes, inputs and outputs carry the graph's names.

    Args:
        opset: the version of the default operator set.
        decompose: op -> function in simpler ops, applied before export.
        external: file beside the model that all weights go to; None keeps them inside while they fit.
        finish: a last rewrite of the model before it is saved.

    Returns:
        The model as it was written.

    Raises:
        LoweringError: an op has no ONNX form.
    """
    program = export_program(graph, positional=True)
    with _quiet():
        if decompose:
            program = program.run_decompositions(dict(decompose))
        try:
            made = torch.onnx.export(
                program,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=opset,
                dynamo=True,
                custom_translation_table=TRANSLATIONS,
                optimize=True,
                verbose=False,
            )
        # The exporter's own error classes are not public.
        except Exception as e:
            raise LoweringError("write_onnx", f"torch.onnx.export failed: {first_line(_cause(e))}") from e
    assert made is not None
    model = made.model
    _name_sizes(graph, model)
    _strip(model)
    # The exporter may give two values one name where a function of ours was decomposed.
    NameFixPass()(model)
    if finish is not None:
        finish(model)
    large = (
        sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        > EXTERNAL_DATA_BYTES
    )
    ir.save(model, path, external_data=external or (f"{path.name}.data" if large else None))
    onnx.checker.check_model(str(path))
    return model


def _cause(error: BaseException) -> BaseException:
    """The exporter's outermost error is a page of advice; the innermost names the op."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _name_sizes(graph: Graph, model: ir.Model) -> None:
    """Inputs and outputs say batch and sequence, not s18 and s41."""
    for values, specs in ((model.graph.inputs, graph.input_specs()), (model.graph.outputs, graph.output_specs())):
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape(spec.shape)


def _strip(model: ir.Model) -> None:
    """Drop what the exporter notes for debugging: stack traces with paths of this machine, and node metadata."""
    model.metadata_props.clear()
    for holder in (model.graph, *model.functions.values()):
        holder.metadata_props.clear()
        for node in holder:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.doc_string = None
    model.doc_string = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and logs about packages that are not wanted here (torchvision) and folding it leaves out."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)
