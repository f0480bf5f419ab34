"""A Hugging Face model from its folder.

Weights in safetensors files come as mapped files: they take no memory of the process until something writes to them, and
the kernel can drop their pages when it is short. So a model larger than memory can be loaded. Weights in other types
than float32 can be made float32, one tensor after another, in files of a folder that is given. What transformers merges
or renames while it loads (the matrices of experts) is made in memory first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tilecut_passes.disk_tensor import DiskTensors, is_file
from tilecut_runtime.errors import CaptureError, first_line


def load_model(folder: Path, offload: Path | None = None) -> nn.Module:
    """A Hugging Face model from its folder, as the class that its config names.

    Args:
        offload: folder for weights that are no mapped float32 tensors yet; all weights are float32 then. None keeps
            them in memory, in the types that they have.

    Raises:
        CaptureError: no such folder, no config, a class that transformers lacks, or weights that are missing, damaged
            or of another shape.
    """
    if not os.path.isfile(folder / "config.json"):
        raise CaptureError(str(folder), "not the folder of a Hugging Face model: it holds no config.json")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder))
        names = config.architectures or ["AutoModel"]
        cls = getattr(transformers, names[0], None)
        if cls is None:
            raise CaptureError(str(folder), "transformers has no such model class", got=names[0])
        # It would only warn of what is missing, and make that up; the sizes are compared below, with their names.
        model, found = cls.from_pretrained(str(folder), output_loading_info=True, ignore_mismatched_sizes=True)
    except CaptureError:
        raise
    # A damaged config or weight file fails wherever transformers first trips over it.
    except Exception as e:
        raise CaptureError(str(folder), f"transformers cannot load it: {first_line(e)}") from e
    mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    for names, problem in (
        (found["missing_keys"], "weights are missing from the model's files"),
        (mismatched, "weights have another shape than the config says"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CaptureError(
                str(folder), problem, got=shown, fix="save the whole model under the class in its config"
            )
    if offload is not None:
        move_to_disk(model, DiskTensors(offload))
    return model


def move_to_disk(model: nn.Module, disk: DiskTensors) -> None:
    """Make floating tensors float32 and put those that are in memory on disk, one after another; ties stay."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        held: dict[str, Any]  # either holds the tensors of its kind
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    moved[id(tensor)] = _moved(tensor, disk)
                held[name] = moved[id(tensor)]


def _moved(tensor: Tensor, disk: DiskTensors) -> Tensor:
    wide = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    made = wide if wide.data_ptr() == tensor.data_ptr() and is_file(tensor) else disk(wide)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
