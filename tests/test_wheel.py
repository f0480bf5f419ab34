"""The built wheel: what is in it, and that it runs an edge artifact in an environment that has never seen torch."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from checks import ROOT

IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()
pytestmark = pytest.mark.skipif(not IN_CHECKOUT, reason="not in a checkout: these tests build the wheel from it")


def command(*arguments: object, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(a) for a in arguments], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # setuptools leaves its build/ and egg-info in the source folder: build from a copy.
    _copy_sources(out / "source")
    command(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, out / "source", cwd=out)
    (built,) = out.glob("*.whl")
    return built


def _copy_sources(to: Path) -> None:
    to.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, to / name)
    for name in ("toolchain", "targets", "passes", "runtime"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))


def test_every_source_file_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for component in ("toolchain", "targets", "passes", "runtime"):
        for path in (ROOT / component).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.parent != ROOT / component:
                assert path.relative_to(ROOT / component).as_posix() in names, path
    assert not [n for n in names if n.startswith("test")]


@pytest.fixture(scope="module")
def without_torch(wheel, tmp_path_factory) -> Path:
    """The python of an environment with the wheel and its core dependencies alone."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return python


@pytest.fixture
def users_folder(tmp_path) -> Path:
    """A folder with files that would shadow packages called `runtime` and `passes`."""
    (tmp_path / "runtime.py").write_text("raise ImportError('the runtime.py of a user was imported')\n")
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("raise ImportError('the passes/ of a user was imported')\n")
    return tmp_path


def test_an_edge_artifact_runs_where_torch_is_not(without_torch, users_folder, edge_artifact):
    code = f"""
import importlib.util, json
import numpy as np
import tilecut
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("onnx") is None
from tilecut import load
session = load({str(edge_artifact.path)!r})
with np.load({str(edge_artifact.path / "ref" / "case_0.npz")!r}) as held:
    case = {{k: held[k] for k in held.files}}
inputs = {{k.partition(":")[2]: v for k, v in case.items() if k.startswith("inputs:")}}
out = session.run(inputs)["pooler_output"]
print(json.dumps([tilecut.__file__, float(abs(out - case["outputs:pooler_output"]).max())]))
"""
    origin, error = json.loads(command(without_torch, "-c", code, cwd=users_folder).splitlines()[-1])
    assert "site-packages" in origin and str(ROOT) not in origin
    assert error < 1e-4


def test_the_command_works_without_torch_and_says_what_compiling_needs(without_torch, users_folder, edge_artifact):
    tilecut = without_torch.parent / "tilecut"
    assert "input_ids" in command(tilecut, "inspect", edge_artifact.path, cwd=users_folder)
    verified = json.loads(command(tilecut, "verify", edge_artifact.path, "--json", cwd=users_folder))
    assert [r["status"] for r in verified["rungs"]] == ["passed", "passed"]
    command(tilecut, "bench", edge_artifact.path, "--sequence", 8, "--rounds", 1, cwd=users_folder)
    refused = subprocess.run([tilecut, "compile", "model"], cwd=users_folder, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "pip install 'tilecut[compile]'" in refused.stderr and "Traceback" not in refused.stderr
