"""Read and write exported programs without weights and without pickle.

A program is a `torch.export` archive whose tensors live on the meta device: the graph travels in the .pt2, the
weights once, in `model.safetensors` beside it. Run without its weights it raises; it never computes with made-up
numbers. `save_program` drops the pickled sample inputs that `torch.export.save` would carry, and the stack traces, which
hold paths of the machine that compiled. `read_program` refuses an archive that holds anything else than a graph and
meta tensors, before torch looks at it: torch unpickles what an archive declares as pickled.
"""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

# Importing them registers the ops of tilecut, which a program may call.
import tilecut_runtime.attention
import tilecut_runtime.attention_varlen
import tilecut_runtime.grouped_matmul
import tilecut_runtime.rotary
from tilecut_runtime.errors import ArtifactError, first_line
from tilecut_runtime.manifest import Manifest

WEIGHTS = "model.safetensors"
CASTS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)
HARMLESS = ("models/", "archive_format", "archive_version", "byteorder", ".data/")


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write the graph of `program`; parameters, buffers and constants become meta tensors of their dtype and shape."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    bare = copy.copy(program)
    bare._example_inputs = None
    bare._state_dict = {k: _to_meta(v) for k, v in program.state_dict.items()}
    bare._constants = {k: _to_meta(v) if isinstance(v, torch.Tensor) else v for k, v in program.constants.items()}
    torch.export.save(bare, path)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    meta = torch.empty_like(tensor, device="meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def tensors_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Every tensor that `save_program` leaves out, by name."""
    held = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)}}
    return {k: v.detach() for k, v in held.items()}


def read_program(path: Path, weights: Path) -> ExportedProgram:
    """The program at `path` with the tensors of `weights` in place.

    Raises:
        ArtifactError: the archive holds more than a graph, either file is damaged, or a tensor is missing or has
            another shape or dtype than the graph says.
    """
    _check_archive(path)
    # A damaged graph fails wherever torch first trips over it.
    try:
        program = torch.export.load(path)
    except Exception as e:
        raise ArtifactError(str(path), f"torch cannot read it ({first_line(e)})", fix="compile the model again") from e
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as e:
        raise ArtifactError(str(weights), f"safetensors cannot read it ({first_line(e)})") from e

    def fill(held: dict) -> None:
        for name, meta in held.items():
            if not isinstance(meta, torch.Tensor):
                continue
            if name not in tensors:
                raise ArtifactError(str(weights), f"tensor {name} is missing")
            tensor = tensors[name]
            if tensor.shape != meta.shape or tensor.dtype != meta.dtype:
                raise ArtifactError(
                    str(weights),
                    f"tensor {name} does not fit the graph",
                    got=f"{tensor.dtype} {list(tensor.shape)}",
                    wanted=f"{meta.dtype} {list(meta.shape)}",
                )
            held[name] = nn.Parameter(tensor, meta.requires_grad) if isinstance(meta, nn.Parameter) else tensor

    fill(program.state_dict)
    fill(program.constants)
    return program


def _check_archive(path: Path) -> None:
    """Only what `save_program` writes: no pickle, no data, no compiled code."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                _, _, name = entry.filename.partition("/")
                if name.startswith("data/") and name.endswith("_config.json"):
                    payloads = json.loads(archive.read(entry))["config"].values()
                    fault = any(p.get("use_pickle") for p in payloads) and "pickled data"
                elif name.startswith(("data/weights/", "data/constants/", "data/sample_inputs/")):
                    fault = entry.file_size > 0 and "data of its own"
                else:
                    fault = not name.startswith(HARMLESS) and "an unknown file"
                if fault:
                    raise ArtifactError(
                        str(path),
                        f"the archive holds {fault}",
                        got=entry.filename,
                        wanted="a graph without weights, as tilecut writes it",
                        fix="do not load it; compile the model again",
                    )
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ArtifactError(str(path), f"not a torch.export archive ({e})", fix="compile the model again") from e


def open_program(folder: Path, manifest: Manifest, entry: str, device: str = "cpu") -> nn.Module:
    """The artifact's program as a module on a device: keyword inputs in, a dict of outputs out."""
    return cast(nn.Module, ready_program(folder, manifest, entry, device).module())


def ready_program(folder: Path, manifest: Manifest, entry: str, device: str) -> ExportedProgram:
    """The artifact's program with its weights on a device, each held in the type that the program reads it in."""
    name = manifest.file_of(folder, entry)
    manifest.check_files(folder, [name, WEIGHTS])
    program = fold_casts(read_program(folder / name, folder / WEIGHTS))
    if device != "cpu":
        # Moves what the graph itself makes (positions, masks) too; Module.to would move the weights alone.
        program = move_to_device_pass(program, device)
    return program


def fold_casts(program: ExportedProgram) -> ExportedProgram:
    """Weights that the program reads in another type alone are held in it, instead of being cast in every run."""
    signature, graph = program.graph_signature, program.graph
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in list(graph.nodes):
        name = held.get(node.name)
        # torch.export asserts the type of what is cast.
        asserts = [user for user in node.users if user.target is torch.ops.aten._assert_tensor_metadata.default]
        users = [user for user in node.users if user not in asserts]
        if name not in program.state_dict or not users or not all(map(_only_casts, users)):
            continue
        if len({user.meta["val"].dtype for user in users}) > 1:
            continue
        weight, node.meta["val"] = program.state_dict[name], users[0].meta["val"]
        made = weight.detach().to(node.meta["val"].dtype)
        program.state_dict[name] = nn.Parameter(made, False) if isinstance(weight, nn.Parameter) else made
        for user in users:
            user.replace_all_uses_with(node)
        for user in (*users, *asserts):
            graph.erase_node(user)
    program.graph_module.recompile()
    return program


def _only_casts(node: fx.Node) -> bool:
    """Whether a call changes its operand's type and nothing else."""
    rest = (*node.args[1:], *node.kwargs.values())
    return node.target in CASTS and all(isinstance(x, torch.dtype) for x in rest if x is not None)


__all__ = ["WEIGHTS", "open_program", "read_program", "ready_program", "save_program", "tensors_of", "tilecut_runtime"]
