"""A saved program as a graph again, without another capture.

Before: `module.pt2` and `model.safetensors` of an artifact, and its manifest
After: a Graph whose inputs, outputs and sizes carry the manifest's names; `load` opens the same model
"""

from __future__ import annotations

from pathlib import Path

import sympy

from tilecut_passes.find_hiding import find_hiding
from tilecut_passes.flat_forward import states
from tilecut_passes.graph import Graph, size_of
from tilecut_passes.unlift_program import unlift_program
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.manifest import Manifest
from tilecut_runtime.torch_program import read_program


def read_graph(program: Path, weights: Path, manifest: Manifest) -> Graph:
    """The graph of a saved program.

    Raises:
        ArtifactError: a file is damaged, or the program is not the manifest's.
    """
    unlifted = unlift_program(read_program(program, weights), manifest.model)
    dims: dict[sympy.Symbol, str] = {}
    placeholders = [n for n in unlifted.module.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, manifest.inputs):
        for size, name in zip(node.meta["val"].shape, spec.shape):
            symbol = size_of(size)
            if isinstance(symbol, sympy.Symbol) and isinstance(name, str) and name.isidentifier():
                dims.setdefault(symbol, name)
    inputs = tuple(spec.name for spec in manifest.inputs)
    graph = Graph(
        unlifted.module,
        inputs,
        unlifted.outputs,
        unlifted.returns,
        dims,
        {name: manifest.dims[name] for name in dims.values() if name in manifest.dims},
        states=states(inputs, unlifted.outputs),
    )
    if len(inputs) != len(placeholders) or graph.input_specs() != manifest.inputs:
        raise ArtifactError(str(program), "the program has other inputs than the manifest says", fix="compile it again")
    graph.hiding, graph.unclear = find_hiding(graph)
    return graph
