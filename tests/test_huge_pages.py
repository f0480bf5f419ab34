"""Memory of a model in huge pages: asked for where Linux offers it, and never in the way."""

import mmap
import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tilecut import PruneConfig, compile_pruned, load
from tilecut_runtime import huge_pages
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.huge_pages import anonymous_memory, in_huge_pages, without

linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked of Linux")
KERNEL = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
offered = pytest.mark.skipif(
    huge_pages.huge_page() is None or KERNEL < (6, 1), reason="this system lays nothing into huge pages at once"
)
MEGABYTES = 1 << 20


def allocate(size):
    """Private memory of its own mapping, written to once."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"x" * size)
    return memory


def in_huge(kind="AnonHugePages"):
    """Bytes of this process in huge pages."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as held:
        line = next(line for line in held if line.startswith(kind))
    return 1024 * int(line.split()[1])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An artifact with 48 MB of weights."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(12))).eval()
    folder = tmp_path_factory.mktemp("wide") / "artifact"
    config = PruneConfig(sparsity=0.0)
    compile_pruned(model, example_inputs=(torch.randn(2, 1024),), config=config, output=folder, measure=False)
    return folder


@pytest.mark.parametrize(
    ("ranges", "others", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(0, 4)], [(4, 10)]),
        ([(0, 10)], [(4, 10)], [(0, 4)]),
        ([(0, 10)], [(2, 4), (6, 8)], [(0, 2), (4, 6), (8, 10)]),
        ([(2, 4), (6, 9)], [(0, 7)], [(7, 9)]),
        ([(2, 4), (6, 9)], [(4, 6), (9, 12)], [(2, 4), (6, 9)]),
    ],
)
def test_what_was_there_before_is_left_out(ranges, others, left):
    assert list(without(ranges, others)) == left


@linux
def test_a_mapping_of_this_process_is_found():
    before = anonymous_memory()
    memory = allocate(8 * MEGABYTES)
    assert sum(end - start for start, end in without(anonymous_memory(), before)) >= len(memory)


@linux
@offered
def test_what_is_allocated_inside_lies_in_huge_pages_and_keeps_its_bytes():
    outside, before = allocate(32 * MEGABYTES), in_huge()
    with in_huge_pages():
        memory = allocate(32 * MEGABYTES)
    # All but the ends, where it begins between two huge pages; what lay outside is left alone.
    assert 24 * MEGABYTES <= in_huge() - before <= 40 * MEGABYTES
    assert memory[:] == outside[:] == b"x" * len(memory)


@linux
@offered
def test_a_loaded_artifact_lies_in_huge_pages(wide):
    # In a process of its own: this one has freed memory, which is taken again and is not new.
    code = """
import sys
import numpy as np
import test_huge_pages
from tilecut_runtime.session import load
before = test_huge_pages.in_huge()
session = load(sys.argv[1], threads=1)
print(test_huge_pages.in_huge() - before)
assert session.run({session.inputs[0].name: np.ones((2, 1024), np.float32)})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, str(wide)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 32 * MEGABYTES


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_nothing_is_asked_where_the_administrator_or_the_system_says_no(wide, monkeypatch, tmp_path, setting):
    given = {load(wide).inputs[0].name: np.ones((2, 1024), np.float32)}
    expected = load(wide, threads=1).run(given)
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "ask", lambda *_: pytest.fail("it was asked"))
    assert huge_pages.huge_page() is None
    found = load(wide, threads=1).run(given)
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in expected.items()}


@linux
@offered
def test_what_is_hardly_touched_stays_as_small_as_it_is():
    before = in_huge("Rss")
    with in_huge_pages():
        sparse = mmap.mmap(-1, 64 * MEGABYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, len(sparse), 2 * MEGABYTES):
            sparse[at] = 1
    assert in_huge("Rss") - before < 8 * MEGABYTES


@linux
@pytest.mark.parametrize("name", [b"a\x0bb\x0cc", "a\u2028b".encode(), b"\xff\xfe", b"two words", b"line\nbreak"])
def test_names_of_mapped_files_may_hold_anything(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(b"x" * mmap.PAGESIZE)
    with open(path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        with in_huge_pages():
            memory = allocate(8 * MEGABYTES)
    assert mapped[0] == memory[0] == ord("x")


@linux
def test_without_the_list_of_mappings_nothing_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "maps")
    with in_huge_pages():
        pass


@linux
@offered
def test_advice_that_is_refused_is_no_error():
    # An address that is not the process's.
    huge_pages.ask(1 << 46, (1 << 46) + (1 << 21))


def test_an_error_inside_is_the_caller_s(tmp_path):
    with pytest.raises(ArtifactError, match="manifest"):
        load(tmp_path)
    with pytest.raises(KeyError), in_huge_pages():
        raise KeyError
