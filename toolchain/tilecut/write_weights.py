"""Write a safetensors file tensor by tensor: memory does not grow with the model, as it does with `save_file`.

The bytes are those that `safetensors` itself writes: 8 bytes of length, a JSON header padded to a multiple of 8, then the
tensors, the widest types first and names in order within a type.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tilecut_runtime.errors import ArtifactError

# In the order in which safetensors writes them.
TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
RANK = {dtype: i for i, dtype in enumerate(TYPES)}


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name; of those that share storage, each is written.

    Raises:
        ArtifactError: a tensor of a type that safetensors has no name for.
    """
    if odd := next((name for name, t in tensors.items() if t.dtype not in TYPES), None):
        raise ArtifactError(str(path), f"safetensors cannot hold {odd}", got=str(tensors[odd].dtype))
    order = sorted(tensors, key=lambda name: (RANK[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
