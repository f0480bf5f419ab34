"""The walls: who may import whom, what importing costs, and that nothing in the repository names a machine."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tilecut
import tilecut_passes
import tilecut_runtime
import tilecut_targets
from checks import ROOT

ORDER = ("tilecut", "tilecut_targets", "tilecut_passes", "tilecut_runtime")
FOLDERS = {
    p.__name__: Path(str(p.__file__)).parent for p in (tilecut, tilecut_targets, tilecut_passes, tilecut_runtime)
}


def imported(path: Path) -> set[str]:
    """First parts of everything that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package):
    above = set(ORDER[: ORDER.index(package)])
    files = list(FOLDERS[package].rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & above, path


@pytest.mark.parametrize("package", ORDER)
def test_a_package_file_holds_a_docstring_and_no_more(package):
    for path in FOLDERS[package].rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(body[0], ast.Expr), path
        # tilecut's own exports, lazily.
        assert len(body) == 1 or path.parent == FOLDERS["tilecut"], path


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(f.parent) for f in FOLDERS.values())},
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "transformers",
    "scipy",
    "sympy",
    "pydantic",
    "safetensors",
    "triton",
}


def test_loading_and_running_an_artifact_imports_nothing_torch_shaped(edge_artifact):
    code = f"""
import numpy as np
from tilecut import load
session = load({str(edge_artifact.path)!r}, threads=1)
ids = np.ones((2, 5), dtype=np.int64)
assert session.run(dict(input_ids=ids, attention_mask=ids, token_type_ids=ids))["pooler_output"].shape == (2, 64)
"""
    held = modules_after(code)
    assert "onnxruntime" in held
    assert not held & HEAVY


@pytest.mark.parametrize("code", ["import tilecut", "import tilecut.cli, tilecut.show, tilecut.cli_inputs"])
def test_importing_is_light(code):
    assert not modules_after(code) & HEAVY


def test_the_public_names():
    assert set(tilecut.__all__) == set(dir(tilecut))
    for name in tilecut.__all__:
        assert getattr(tilecut, name) is not None
    # Functions, not the modules of the same names.
    assert all(callable(f) for f in (tilecut.attention, tilecut.attention_varlen, tilecut.register_attention))
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = tilecut.magic


def test_the_packages_are_where_this_run_says():
    """`make test-wheel` sets TILECUT_FROM, to be sure that the wheel is what its tests import."""
    wanted = os.environ.get("TILECUT_FROM", str(ROOT))
    for folder in FOLDERS.values():
        assert folder.is_relative_to(wanted)
        assert (folder / "py.typed").is_file()
