"""Lay the memory that a model is opened in into huge pages, where Linux gives them to those who ask.

A decoder reads every weight for every token, and a processor that knows its memory in pages of 4 KB spends a good part of
that on looking pages up. With pages of 2 MB it does not. Most distributions set transparent huge pages to "madvise": only
memory that was asked for gets them. numpy asks for its large arrays; the runtimes of models do not for their weights.
Nothing is asked where the administrator's setting is "never", nor on other systems than Linux.

Sources: Linux' Documentation/admin-guide/mm/transhuge.rst, madvise(2); docs/edge.md has more.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS = Path("/proc/self/maps")
# madvise's advice from Linux 6.1 on: at once, instead of in the background.
MADV_COLLAPSE = 25

Range = tuple[int, int]


@contextmanager
def in_huge_pages() -> Iterator[None]:
    """What this process allocates inside, in any thread, and fills lies in huge pages afterwards, as far as there are any.

    It is advice, and never fails.
    """
    size = huge_page()
    if size is None:
        yield
        return
    before = anonymous_memory()
    yield
    known = set(before)
    grown = [one for one in anonymous_memory() if one not in known]
    for start, end in without(grown, before):
        for full in filled(-(-start // size) * size, end // size * size, size):
            ask(*full)


def huge_page() -> int | None:
    """Bytes of a huge page, or None where there are none to ask for."""
    try:
        if "[never]" in (SETTINGS / "enabled").read_text() or not MAPS.is_file():
            return None
        return int((SETTINGS / "hpage_pmd_size").read_text())
    # Another system, a kernel without them, or a container that hides the setting.
    except (OSError, ValueError):
        return None


def anonymous_memory() -> list[Range]:
    """The address ranges that this process allocated for itself and may write, in order."""
    found = []
    # As bytes: names of files may hold anything.
    for line in MAPS.read_bytes().split(b"\n"):
        addresses, rights, *rest = line.split(None, 5) or [b"", b""]
        if rights == b"rw-p" and (len(rest) == 3 or rest[3] == b"[heap]"):
            start, end = (int(one, 16) for one in addresses.split(b"-"))
            found.append((start, end))
    return found


def without(ranges: list[Range], others: list[Range]) -> Iterator[Range]:
    """The parts of `ranges` that lie in none of `others`; both are in order, and neither overlaps itself."""
    for start, end in ranges:
        for low, high in others:
            if low < end and high > start:
                if start < low:
                    yield start, low
                start = high
        if start < end:
            yield start, end


def filled(start: int, end: int, size: int) -> Iterator[Range]:
    """The runs of huge pages in a range that are half written to, at least: a huge page fills what was never touched."""
    if start >= end:
        return
    touched = np.zeros((end - start) // mmap.PAGESIZE, np.uint8)
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    # Refused where another thread gave the memory back meanwhile: then none is touched.
    mincore(start, end - start, touched.ctypes.data)
    full = (touched & 1).reshape(-1, size // mmap.PAGESIZE).mean(1) >= 0.5
    edges = np.flatnonzero(np.diff(full, prepend=False, append=False)).tolist()
    for first, last in zip(edges[::2], edges[1::2]):
        yield start + first * size, start + last * size


def ask(start: int, end: int) -> None:
    """Advise huge pages for a range of whole ones."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # The first is for kernels that do not know the second.
    for advice in (mmap.MADV_HUGEPAGE, MADV_COLLAPSE):
        madvise(start, end - start, advice)
