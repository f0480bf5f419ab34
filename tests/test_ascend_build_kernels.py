"""The kernels in an artifact: what is written, the object where CANN is, and the rungs that need no NPU."""

import json
import shlex
import shutil
import subprocess
from typing import NamedTuple

import pytest

from test_ascend_list_kernels import graph_of
from tilecut_runtime.errors import ArtifactError, ConfigError, LoweringError
from tilecut_runtime.manifest import sha256
from tilecut_targets.ascend import build_kernels, environments
from tilecut_targets.ascend.build_kernels import FITS, FUSED, RAN, check_kernels, compile_kernels
from tilecut_targets.ascend.plan_kernel import LINALG, PLAN, SOURCE

NAME = "attention_d16_bottom_right_padding"
# What CANN's compiler is told, and that it finds what it is told to compile.
COMPILER = """#!/bin/bash
set -eu
[[ $* == "kernel.ttadapter.mlir --target=Ascend910B3 --enable-auto-multi-buffer=true --enable-auto-bind-sub-block=true \
--enable-hivm-compile=true --enable-hfusion-compile=true --enable-triton-kernel-compile=true -o kernel" ]]
grep -q "func.func @attention_forward" "$1"
command -v hivmc > /dev/null
echo object > kernel.o
"""


class Soc(NamedTuple):
    soc: str
    family: str


A2, P310 = Soc("Ascend910B3", "a2"), Soc("Ascend310P3", "p310")
toolchain = pytest.mark.toolchain("ascend-kernels")


def graph():
    return graph_of({"causal": "bottom_right", "padded": True}, {"biased": True})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact")
    return folder, compile_kernels(graph(), A2, folder)


@pytest.fixture
def copied(built, tmp_path):
    return shutil.copytree(built[0], tmp_path / "copy")


@pytest.fixture
def cann(tmp_path, monkeypatch):
    """A machine with CANN: bishengir-compile and hivmc on PATH."""
    (tmp_path / "bin").mkdir()
    for name, text in (("bishengir-compile", COMPILER), ("hivmc", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return tmp_path / "bin"


@toolchain
def test_what_is_written(built):
    folder, facts = built
    (one,) = facts["kernels"]
    assert facts["refused"] == [{"node": "attention_1", "why": "an additive bias"}]
    held = folder / "kernels" / NAME
    assert sorted(p.name for p in held.iterdir()) == [
        "kernel.hivm.mlir",
        "kernel.py",
        LINALG,
        "kernel.ttir",
        "use.json",
    ]
    use = json.loads((held / "use.json").read_text())
    assert {"name": NAME, **use} == one
    assert use["variant"]["width"] == 16 and use["variant"]["causal"] == "bottom_right" and use["variant"]["padding"]
    assert (use["soc"], use["kernel"], use["nodes"]) == ("Ascend910B3", "attention_forward", ["attention"])
    assert not use["degraded"] and use["versions"]["triton-ascend"] == "3.2.0" and "object" not in use
    assert use["memories"]["ub"]["capacity"] == 192 * 1024
    assert 0 < use["memories"]["ub"]["used"] <= 192 * 1024 and use["memories"]["l1"]["used"] > 0
    assert use["source_sha256"] == sha256(held / "kernel.py") == sha256(SOURCE)


@toolchain
def test_nothing_names_the_machine(built):
    folder, _ = built
    for path in folder.rglob("*.*"):
        text = path.read_text()
        assert str(SOURCE.parent) not in text and "/tmp" not in text and str(environments.toolchains()) not in text


@toolchain
def test_rungs(built):
    rungs = {rung.name: rung for rung in check_kernels(built[0])}
    assert [(r.name, r.status) for r in rungs.values()] == [(RAN, "passed"), (FUSED, "passed"), (FITS, "passed")]
    ran, fused, share = (rung.figure or 0.0 for rung in rungs.values())
    assert 0 < ran < 4e-3 and 0 < fused < 4e-3 and 0 < share <= 1
    assert f"{NAME} " in rungs[FITS].detail and "of 196,608" in rungs[FITS].detail


@toolchain
def test_what_was_changed_is_found(copied, monkeypatch):
    held = copied / "kernels" / NAME
    use = json.loads((held / "use.json").read_text())
    monkeypatch.setattr(build_kernels, "run_kernel", lambda *_: 1.0)
    (held / "use.json").write_text(
        json.dumps({**use, "memories": {**use["memories"], "ub": {"used": 1, "capacity": 2}}})
    )
    ran, fused, fits = check_kernels(copied)
    assert (ran.status, fused.status, fits.status) == ("failed", "failed", "failed")
    assert ran.figure == 1.0 and "wrong: " + NAME in ran.detail and "not what use.json says" in fits.detail
    (held / "use.json").write_text(json.dumps({**use, "degraded": True, "switched_off": ["enable-auto-multi-buffer"]}))
    assert "degraded: enable-auto-multi-buffer switched off" in check_kernels(copied)[2].detail
    (held / "kernel.py").write_text("pass\n")
    with pytest.raises(ArtifactError, match=r"kernel\.py: is not the source that use\.json speaks of"):
        check_kernels(copied)
    (held / PLAN).unlink()
    with pytest.raises(ArtifactError, match=r"kernel\.hivm\.mlir: file of a kernel is missing"):
        check_kernels(copied)


@toolchain
def test_the_object_is_made_where_cann_is(cann, built, tmp_path):
    (one,) = compile_kernels(graph(), A2, tmp_path)["kernels"]
    made = tmp_path / "kernels" / NAME / "kernel.o"
    assert one["object"] == {"file": "kernel.o", "sha256": sha256(made)} and made.read_text() == "object\n"
    # The command of an artifact that was compiled elsewhere makes it too.
    folder = shutil.copytree(built[0] / "kernels" / NAME, tmp_path / "elsewhere")
    subprocess.run(shlex.split(built[1]["kernels"][0]["command"]), cwd=folder, check=True)
    assert (folder / "kernel.o").is_file()


@toolchain
def test_an_object_that_is_not_made_is_an_error(cann, tmp_path):
    (cann / "bishengir-compile").write_text("#!/bin/sh\necho 'error: no license' >&2\nexit 1\n")
    with pytest.raises(LoweringError, match=f"bishengir-compile: made no object of {NAME}; got error: no license"):
        compile_kernels(graph(), A2, tmp_path)


@toolchain
def test_without_the_environment_the_plan_is_still_read(built, monkeypatch):
    monkeypatch.setattr(build_kernels, "is_installed", lambda name: False)
    ran, fused, fits = check_kernels(built[0])
    assert (ran.status, fused.status, fits.status) == ("not run", "not run", "passed")
    assert ran.detail == "needs the private environment: tilecut toolchain install ascend"


def test_without_the_environment_nothing_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("TILECUT_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="ascend-kernels: this private environment is not installed; run `tilecut"):
        compile_kernels(graph(), A2, tmp_path / "artifact")


def test_other_chips_have_no_kernels(tmp_path):
    facts = compile_kernels(graph(), P310, tmp_path)
    assert facts["kernels"] == [] and "not for Ascend310P3" in facts["refused"][0]["why"]
    assert check_kernels(tmp_path) == []
