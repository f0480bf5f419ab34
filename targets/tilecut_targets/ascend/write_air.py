"""Write `graph/model.air`, the GE model that ATC takes (`--framework=1`), with the fused ops of A2, A3 and 950.

torchair's own converters make it, in the private environment "ascend-air" (`environments.py`), from the program of
`npu_program.py`; weights lie inside, batch and sequence stay open (-1) wherever the graph leaves them open. `check_air`
then checks the program's calls against torch_npu's own schemas (rung 2), and executes the .air on the reference inputs
(rung 4, `evaluate_air.py`; it needs no environment).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from tilecut_passes.graph import Graph
from tilecut_runtime.errors import LoweringError
from tilecut_runtime.manifest import Manifest, Rung
from tilecut_runtime.npu_attention import SCHEMA, WHERE
from tilecut_runtime.npu_norms import SCHEMAS
from tilecut_runtime.reference import Case
from tilecut_runtime.torch_program import save_program, tensors_of
from tilecut_targets.ascend import environments
from tilecut_targets.ascend.chips import Chip
from tilecut_targets.ascend.evaluate_air import evaluate_air
from tilecut_targets.ascend.legality import family_row, fuses
from tilecut_targets.ascend.npu_program import NPU_PROGRAM, npu_program
from tilecut_targets.ascend.read_air import read_air
from tilecut_targets.target import rung

ENVIRONMENT = "ascend-air"
AIR = "graph/model.air"
OPERATOR, NORM = "FusedInferAttentionScore", "RmsNorm"
ROTARY = ("RotaryMul", "RotaryPositionEmbedding")
# A protobuf message ends at 2 GB; torchair keeps 200 MB of them for the graph, and above that would move weights to files
# at absolute paths.
WEIGHTS_LIMIT = (2048 - 200) << 20
TIMEOUT = 1800.0


def write_air(graph: Graph, chip: Chip, folder: Path) -> dict[str, object]:
    """Write `graph/model.air` and `graph/model_npu.pt2` of a fused graph; returns facts for the report.

    Args:
        graph: with `tilecut::attention`, before any lowering of the target's.
        chip: of a family that has FusedInferAttentionScore.
        folder: the artifact's.

    Raises:
        ConfigError: the private environment is not installed.
        LoweringError: chips without a fused attention in a GE model, weights of more than 2 GB, an operator that torchair has
            no converter for, or an attention that nothing expresses.
    """
    if not fuses(chip.family, "air"):
        raise LoweringError(
            "write_air",
            f"{family_row(chip.family)['products']} have no fused attention in a GE model",
            got=chip.soc,
            fix=f"build graph/model_atc.onnx for them; {OPERATOR} is for A2, A3 and 950",
        )
    program, lowered = npu_program(graph, chip.family)
    size = sum(tensor.nbytes for tensor in tensors_of(program).values())
    if size > WEIGHTS_LIMIT:
        raise LoweringError(
            "write_air",
            "a GE model holds its weights, and a protobuf message ends at 2 GB",
            got=f"{size / 2**30:.1f} GiB of weights",
            wanted=f"at most {WEIGHTS_LIMIT / 2**30:.1f} GiB",
            fix="build graph/model_atc.onnx instead, whose weights lie beside it",
        )
    (folder / AIR).parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        whole, made = Path(scratch) / "program.pt2", Path(scratch) / "model.air"
        _save_whole(program, whole)
        script = environments.SCRIPTS / "export_air.py"
        request = {"program": str(whole), "inputs": list(graph.inputs), "air": str(made), "soc": chip.soc}
        answer = environments.call(ENVIRONMENT, script, request, TIMEOUT)
        (folder / AIR).write_bytes(made.read_bytes())
    save_program(program, folder / NPU_PROGRAM)
    return {
        "air_attention": answer["operators"].get(OPERATOR, 0),
        "air_norms": answer["operators"].get(NORM, 0),
        "air_rotary": sum(answer["operators"].get(name, 0) for name in ROTARY),
        "air_operators": answer["operators"],
        "air_inputs": answer["inputs"],
        "air_refusals": [f"{one.node}: {one.why}" for one in lowered.refusals[len(graph.refusals) :]],
    }


def _save_whole(program: ExportedProgram, path: Path) -> None:
    """With weights, for a process of our own to read; without the inputs that it was traced with."""
    whole = copy.copy(program)
    whole._example_inputs = None
    torch.export.save(whole, path)


def check_air(folder: Path, manifest: Manifest, cases: Sequence[Case]) -> list[Rung]:
    """Rungs 2 and 4 of the verification ladder; rung 2 is "not run" where the environment is missing."""
    return [_check_schemas(folder), _check_numbers(folder, manifest, cases)]


def _check_schemas(folder: Path) -> Rung:
    name = "torch_npu schemas"
    if not environments.is_installed(ENVIRONMENT):
        return Rung(name, "not run", f"needs the private environment: {environments.INSTALL}")
    request = {"program": str((folder / NPU_PROGRAM).resolve()), "schemas": {WHERE: SCHEMA, **SCHEMAS}}
    answer = environments.call(ENVIRONMENT, environments.SCRIPTS / "check_schemas.py", request, TIMEOUT)
    calls = ", ".join(f"{count} of {op}" for op, count in answer["calls"].items()) or "none"
    detail = f"calls ({calls}) bound to the schemas of torch_npu, shapes and types as its meta kernels say"
    return rung(name, len(answer["faults"]), 0, "; ".join([detail, *answer["faults"]]))


def _check_numbers(folder: Path, manifest: Manifest, cases: Sequence[Case]) -> Rung:
    operators = read_air(folder / AIR)
    outputs = [spec.name for spec in manifest.outputs]
    worst = 0.0
    for case in cases:
        with torch.no_grad():
            got = evaluate_air(operators, {k: torch.from_numpy(v) for k, v in case.inputs.items()})
        worst = max(worst, case.error({k: v.numpy() for k, v in zip(outputs, got, strict=True)}))
    count = sum(op.type == OPERATOR for op in operators)
    detail = f"{AIR} executed operator by operator on the CPU ({len(operators)} operators, {count} {OPERATOR})"
    return rung("GE model equals pruned model", worst, manifest.tolerance, detail)
