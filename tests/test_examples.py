"""Every example runs as its first lines say, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import tilecut
import tilecut_passes
import tilecut_runtime
import tilecut_targets
from checks import ROOT


def run_example(name: str, folder: Path, *arguments: object) -> str:
    packages = (tilecut, tilecut_targets, tilecut_passes, tilecut_runtime)
    paths = os.pathsep.join(str(Path(str(p.__file__)).parent.parent) for p in packages)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_own_pass(tmp_path):
    out = run_example("own_pass.py", tmp_path)
    assert "'rewrites': 1" in out and "(128, 10)" in out
    lines = (ROOT / "examples" / "own_pass.py").read_text().split("@dataclass")[1].split("if __name__")[0]
    assert len(lines.splitlines()) < 40


def test_hand_written_plan(tmp_path):
    out = run_example("hand_written_plan.py", tmp_path)
    assert "[192, 192] [160, 192] [256, 192]" in out
    assert "[768, 192] [700, 192] [704, 192]" in out
    assert all(float(line.split()[-1]) < 1e-5 for line in out.splitlines() if "against" in line or "padded" in line)


def test_run_without_torch(tmp_path, edge_artifact):
    out = run_example("run_without_torch.py", tmp_path, edge_artifact.path)
    assert "largest difference 0.0" in out


def test_explore_budgets(tmp_path):
    out = run_example("explore_budgets.py", tmp_path)
    assert "mean cosine to the dense outputs against milliseconds, calculated" in out and "no legal model fits" in out
    assert "rows of the table measured again: 0" in out
    assert {"explore.json", "explore.png", "explore.html"} == {p.name for p in (tmp_path / "front").iterdir()}


def test_recover_in_your_own_loop(tmp_path):
    out = run_example("recover_in_your_own_loop.py", tmp_path)
    before, after = (float(x) for x in out.split("relative error ")[1].split("\n")[0].split(" -> "))
    assert after < 0.9 * before
    assert "recover-trained passed" in out


def test_no_example_is_left_out():
    tested = {"explore_budgets.py", "own_pass.py", "hand_written_plan.py", "run_without_torch.py"}
    tested.add("recover_in_your_own_loop.py")
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == tested
