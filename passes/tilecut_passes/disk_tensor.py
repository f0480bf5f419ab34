"""Tensors in files that are mapped into memory: models and activations larger than memory.

A mapped tensor reads and writes like any other. The kernel writes its pages back when memory is short and reads them
again when they are asked for, so it counts as page cache and not as the process's own memory. A file has no name any
more once it is mapped: its space is free again when the last tensor in it is gone, also after a kill.

The folder must lie on a disk. In one that lies in memory (tmpfs) nothing can be written back.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tilecut_runtime.errors import ConfigError

# Smaller tensors stay in memory: a mapping costs a page at least, and their number is limited.
LEAST_BYTES = 1 << 20
ALIGNMENT = 64
# What this process has mapped, on Linux.
MAPS = Path("/proc/self/maps")
# Activations that wait between two layers stay in memory up to this many bytes in all.
IN_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class DiskTensors:
    """Puts tensors into files of a folder."""

    folder: Path

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError("offload", f"the folder cannot be made ({e.strerror})", got=str(self.folder)) from e

    def __call__(self, tensor: Tensor) -> Tensor:
        """A large tensor of the CPU as a mapped one of the same values; any other, or one that is mapped, as it is."""
        size = tensor.numel() * tensor.element_size()
        if size < LEAST_BYTES or tensor.device.type != "cpu" or is_mapped(tensor):
            return tensor
        whole = tensor.detach().contiguous()
        # A part of something larger would bring all of it along.
        return self.put([whole if whole.untyped_storage().nbytes() == size else whole.clone()])[0]

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the CPU as mapped ones in one file; those that share storage share it afterwards.

        Raises:
            ConfigError: the folder takes no more.
        """
        starts: dict[int, int] = {}
        storages: list[torch.UntypedStorage] = []
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in starts:
                starts[storage.data_ptr()] = size
                storages.append(storage)
                size += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        mapped = self._write(storages, max(size, ALIGNMENT))
        out = []
        for tensor in tensors:
            offset = starts[tensor.untyped_storage().data_ptr()] // tensor.element_size() + tensor.storage_offset()
            out.append(torch.empty(0, dtype=tensor.dtype).set_(mapped, offset, tensor.size(), tensor.stride()))
        return out

    def _write(self, storages: Sequence[torch.UntypedStorage], size: int) -> torch.UntypedStorage:
        # Written, not copied into the mapping: a full disk is then an error, and no SIGBUS.
        try:
            handle, path = tempfile.mkstemp(prefix="tilecut-", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    for storage in storages:
                        file.write(_bytes_of(storage))
                        file.write(bytes(-storage.nbytes() % ALIGNMENT))
                    file.truncate(size)
                return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(path, shared=True, nbytes=size))
            finally:
                os.unlink(path)
        except OSError as e:
            raise ConfigError(
                "offload",
                f"a tensor cannot be written ({e.strerror})",
                got=f"{size} bytes to {self.folder}",
                fix="name a folder with more room",
            ) from e


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's storage is a file that this module mapped."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def is_file(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file that anybody mapped, as safetensors does; where the system cannot tell, False."""
    if is_mapped(tensor):
        return True
    if tensor.device.type != "cpu" or not MAPS.is_file():
        return False
    address = tensor.data_ptr()
    for line in MAPS.read_text().splitlines():
        # low-high permissions offset device inode path
        fields = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in fields[0].split("-"))
        if low <= address < high:
            return fields[4] != "0"
    return False


def return_freed_memory() -> None:
    """Make the C library return what was freed, where it can (glibc).

    It keeps it otherwise, in holes that the next tensor of the same size does not fit into: aligned, that one needs a
    little more. So memory would grow with every tensor that moves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass
class WaitingTensors:
    """Where activations wait: in memory up to `limit` bytes of all owners together, beyond that on disk.

    Args:
        disk: where to; None makes files in the system's folder for temporary files, when they are needed.
        limit: 0 where everything goes to disk.
    """

    disk: DiskTensors | None = None
    limit: int = IN_MEMORY_BYTES
    held: dict[Hashable, int] = field(default_factory=dict)
    has_moved: bool = False

    def put(self, owner: Hashable, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that an owner lets wait (all of them, in place of those of last time), mapped where need be."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not is_mapped(t)}
        self.held[owner] = sum(storages.values())
        if sum(self.held.values()) <= self.limit or not storages:
            return list(tensors)
        if self.disk is None:
            self.disk = DiskTensors(Path(tempfile.gettempdir()))
        self.held[owner] = 0
        self.has_moved = True
        moved = iter(self.disk.put([t.detach().cpu() for t in tensors if not is_mapped(t)]))
        return [t if is_mapped(t) else next(moved) for t in tensors]

    def give_back(self) -> None:
        """Return the memory of tensors that have moved, and that nobody holds any more, to the system."""
        if self.has_moved:
            return_freed_memory()
        self.has_moved = False
