"""Cubins in an artifact: what a program launches is built offline, and triton takes it instead of compiling."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch import nn
from triton import knobs

from checks import ROOT, randomise
from tilecut_passes.capture import capture
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.graph import Graph
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.attention import attention
from tilecut_runtime.attention_varlen import attention_varlen
from tilecut_runtime.errors import ArtifactError, LoweringError
from tilecut_runtime.kernels.choose_tile import choose_tile, measured_tiles
from tilecut_runtime.load_cubins import KERNELS, Loaded, kernel_sources, load_cubins, read_kernels
from tilecut_runtime.manifest import Manifest, list_files
from tilecut_targets.compute_in import ComputeIn
from tilecut_targets.cuda.build_cubins import build_cubins
from tilecut_targets.cuda.compile_kernels import gpu_target
from tilecut_targets.cuda.list_launches import list_launches
from tilecut_targets.cuda.offline_driver import offline

ARCH = "sm_80"


class TwoAttentions(nn.Module):
    """Grouped heads with padding, and a wider one with a bias: two sets of constants."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.wide = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(32, 3 * 96)
        self.bias = nn.Parameter(torch.randn(1, 2, 1, 1))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 16).transpose(1, 2)
        k, v = self.kv(x).view(b, s, 2, 2, 16).permute(2, 0, 3, 1, 4)
        one = attention(q, k, v, key_padding=mask != 0, causal="bottom_right")
        q, k, v = self.wide(x).view(b, s, 3, 2, 48).permute(2, 0, 3, 1, 4)
        two = attention(q, k, v, bias=self.bias.expand(1, 2, s, s))
        return torch.cat((one, two.unflatten(-1, (3, 16))[..., 0, :].repeat(1, 2, 1, 1)), -1)


@pytest.fixture(scope="module")
def graph() -> Graph:
    mask = torch.ones(2, 7, dtype=torch.long)
    made = capture(randomise(TwoAttentions()), {"x": torch.randn(2, 7, 32), "mask": mask})
    run_passes(made, [FuseAttention()])
    return made


@pytest.fixture(scope="module")
def built(graph, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return folder, build_cubins(graph, [ARCH], folder)


def manifest_of(folder) -> Manifest:
    return Manifest("cuda", "torch", "Model", {}, (), (), files=list_files(folder))


def test_every_attention_has_its_kernels_for_many_queries_and_for_few(built):
    _, cubins = built
    assert {(c.kernel, c.width) for c in cubins} == {
        (kernel, width)
        for kernel in ("attention_forward", "attention_decode", "attention_combine")
        for width in (16, 48)
    }
    for one in cubins:
        assert (one.arch, one.dtype) == (ARCH, "fp32")
        assert one.registers > 0 and one.spills == 0 and one.shared_bytes <= 166912
        assert one.source == kernel_sources()[one.kernel][0]


def test_nothing_in_it_names_this_machine(built):
    folder, cubins = built
    for file in (p for p in folder.rglob("*") if p.is_file()):
        held = file.read_bytes()
        for path in (ROOT, Path.home(), Path(triton.__file__).parent, folder):
            assert str(path).encode() not in held, (file, path)
    held = json.loads((folder / KERNELS).read_text())
    assert held["triton"] == triton.__version__
    assert read_kernels(folder, manifest_of(folder))[1] == cubins


@pytest.fixture
def compilations(monkeypatch):
    """Whether triton found each kernel that it was asked for."""
    found: list[bool] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
        yield found


def test_what_is_loaded_is_not_compiled(graph, built, tmp_path, monkeypatch, compilations):
    """Triton's own cache is empty, and it is asked for every launch of the graph."""
    folder, cubins = built
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with offline(gpu_target(ARCH)):
        assert load_cubins(folder, manifest_of(folder), ARCH) == Loaded(len(cubins))
        assert compilations == [True] * len(cubins)
        kernels = {launch.run(warmup=True).asm["cubin"] for launch in list_launches(graph, ARCH)}
    assert compilations == [True] * len(cubins)
    assert kernels == {(folder / one.file).read_bytes() for one in cubins}
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_another_type_is_compiled(graph, built, tmp_path, monkeypatch, compilations):
    folder, _ = built
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    half = graph.copy()
    run_passes(half, [ComputeIn(torch.float16)])
    with offline(gpu_target(ARCH)):
        load_cubins(folder, manifest_of(folder), ARCH)
        compilations.clear()
        for launch in list_launches(half, ARCH):
            launch.run(warmup=True)
    assert compilations and not any(compilations)


@pytest.mark.parametrize(
    ("arch", "change", "reason"),
    [
        ("sm_90", {}, "carries none for sm_90"),
        (ARCH, {"triton": "3.0.0"}, r"made by triton 3\.0\.0, and this is"),
        (ARCH, {"source": "0"}, "6 are of another version of the kernels"),
    ],
)
def test_what_does_not_fit_is_left_to_triton(built, tmp_path, arch, change, reason):
    folder = tmp_path / "copy"
    shutil.copytree(built[0], folder)
    held = json.loads((folder / KERNELS).read_text())
    held["triton"] = change.get("triton", held["triton"])
    for one in held["cubins"]:
        one["source"] = change.get("source", one["source"])
    (folder / KERNELS).write_text(json.dumps(held))
    loaded = load_cubins(folder, manifest_of(folder), arch)
    assert loaded.count == 0 and re.search(reason, loaded.reason)


def test_an_artifact_without_kernels(tmp_path):
    assert load_cubins(tmp_path, manifest_of(tmp_path), ARCH) == Loaded(0, "the artifact carries none")


def test_damage_is_said(built, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(built[0], folder)
    manifest = manifest_of(folder)
    cubin = folder / built[1][0].file
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"?")
    with offline(gpu_target(ARCH)), pytest.raises(ArtifactError, match="file was altered"):
        load_cubins(folder, manifest, ARCH)
    (folder / KERNELS).write_text('{"triton": "3", "cubins": [{}]}')
    with pytest.raises(ArtifactError, match="malformed list of kernels"):
        load_cubins(folder, manifest_of(folder), ARCH)


class Packed(nn.Module):
    """Packed sequences, as a model's own call."""

    def forward(self, q: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return attention_varlen(q, q, q, bounds, bounds, max_q=64, max_k=64, causal="bottom_right")[0]


def test_packed_attention_has_kernels_too(tmp_path):
    graph = capture(
        Packed(),
        {"q": torch.randn(9, 2, 32), "bounds": torch.tensor([0, 4, 9], dtype=torch.int32)},
        {"q": {0: "tokens"}, "bounds": {0: "bounds"}},
    )
    cubins = build_cubins(graph, [ARCH], tmp_path)
    assert {(c.kernel, c.width) for c in cubins} == {("attention_forward", 32)}
    assert cubins[0].launch["signature"]["Tiles"] == "*i32"


def test_loading_twice_keeps_the_kernels_that_are_there(graph, built, tmp_path, monkeypatch):
    folder, cubins = built
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with offline(gpu_target(ARCH)):
        load_cubins(folder, manifest_of(folder), ARCH)
        before = [launch.run(warmup=True) for launch in list_launches(graph, ARCH)]
        assert load_cubins(folder, manifest_of(folder), ARCH) == Loaded(len(cubins))
        assert all(launch.run(warmup=True) is one for launch, one in zip(list_launches(graph, ARCH), before))


def test_what_was_tuned_for_this_machine_does_not_travel(graph, built, tmp_path, monkeypatch):
    tile = [16, 16, 4, 1]
    table = {ARCH: {d: {"32": {"16": tile, "48": tile}} for d in ("forward", "decode")}}
    (tmp_path / "tiles.json").write_text(json.dumps({"tiles": table}))
    monkeypatch.setenv("TILECUT_CACHE", str(tmp_path))
    measured_tiles.cache_clear()
    assert list(choose_tile(ARCH, "forward", 16, 32)) == tile
    assert {tuple(launch.tile) for launch in list_launches(graph, ARCH)} == {tuple(one.tile) for one in built[1]}
    measured_tiles.cache_clear()


def test_a_head_too_wide_is_one_error(tmp_path):
    graph = capture(OneCall(), {"q": torch.randn(1, 2, 7, 320)})
    with pytest.raises(LoweringError, match="the kernels have no heads that wide; got 320; wanted at most 256"):
        build_cubins(graph, [ARCH], tmp_path)
    assert not any(tmp_path.iterdir())


class OneCall(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return torch.ops.tilecut.attention(
            q, q, q, None, None, None, scale=1.0, causal="none", window=[-1, -1], global_tokens=0, softcap=0.0, dropout_p=0.0
        )


@pytest.mark.parametrize(
    ("environment", "without", "message"),
    [
        ({"TRITON_INTERPRET": "1"}, "", "the kernels were imported for the interpreter; unset TRITON_INTERPRET"),
        ({}, "triton", r"built by triton, which is not installed; pip install 'tilecut\[cuda\]'"),
    ],
)
def test_kernels_that_cannot_be_built_are_one_error(tmp_path, environment, without, message):
    script = f"""
import sys
for name in {without.split()!r}: sys.modules[name] = None
from checks import compiled
from tilecut_runtime.errors import ConfigError
try:
    compiled("cuda:orin", {str(tmp_path / "artifact")!r}, config=None, calibration=None)
except ConfigError as e:
    print(e)
"""
    paths = os.pathsep.join(str(ROOT / name) for name in ("toolchain", "passes", "targets", "runtime", "tests"))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(message, done.stdout), done.stdout + done.stderr
    assert not any(tmp_path.iterdir())
