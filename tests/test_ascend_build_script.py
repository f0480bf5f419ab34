"""`build_on_cann.sh` against tools that stand in for CANN's: every option and path of every call, twice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checks import emit, encoder_graph
from tilecut_runtime.session import load
from tilecut_targets.ascend.build_script import SCRIPT
from tilecut_targets.ascend.target import AscendTarget


@pytest.fixture(scope="module", autouse=True)
def no_private_environments():
    """As on a machine without them, whatever this one has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilecut_targets.ascend.target.is_installed", lambda name: False)
        yield

# Each checks that it is called as the real one would be, writes what it would write, and notes the call.
ATC = """
import os, pathlib, sys
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
assert all(word.startswith("--") for word in sys.argv[1:])
known = {"model", "framework", "output", "soc_version", "input_format", "input_shape", "dynamic_dims", "precision_mode_v2"}
assert set(given) <= known, given
model = pathlib.Path(given["model"])
assert model.is_file() and given["framework"] == {".onnx": "5", ".air": "1"}[model.suffix]
assert (model.parent / "weights.bin").is_file()
assert given["precision_mode_v2"] in ("origin", "fp16", "cube_fp16in_fp32out")
if model.suffix == ".air":
    assert not {"input_shape", "dynamic_dims"} & set(given)
else:
    assert given["input_format"] == "ND"
    sizes = [n for one in given["input_shape"].split(";") for n in one.split(":")[1].split(",")]
    profiles = [p.split(",") for p in given.get("dynamic_dims", "").split(";") if p]
    assert len(profiles) != 1 and all(len(p) == sizes.count("-1") for p in profiles) and bool(profiles) == ("-1" in sizes)
pathlib.Path(given["output"] + ".om").write_text("om")
open(os.environ["CALLS"], "a").write(" ".join(["atc", *sys.argv[1:]]) + "\\n")
"""
COMPILER = """
import os, pathlib, sys
assert sys.argv[1] == "k.ttadapter.mlir" and pathlib.Path(sys.argv[1]).is_file()
assert sys.argv[2] == "--target=Ascend910B3" and sys.argv[3:4] == ["-o"]
pathlib.Path(sys.argv[4] + os.environ.get("SUFFIX", ".o")).write_text("kernel")
open(os.environ["CALLS"], "a").write(" ".join(["bishengir-compile", *sys.argv[1:]]) + "\\n")
"""
# Runs the verify twin in the place of the .om.
AIS_BENCH = """
import argparse, os, pathlib, sys
import numpy as np, onnxruntime as ort
parser = argparse.ArgumentParser()
for name in ("model", "input", "output", "output_dirname", "outfmt", "device", "auto_set_dymdims_mode"):
    parser.add_argument("--" + name)
given = parser.parse_args()
assert pathlib.Path(given.model).read_text() == "om" and given.outfmt == "NPY" and given.device == "0"
session = ort.InferenceSession("graph/verify.onnx", providers=["CPUExecutionProvider"])
files = given.input.split(",")
feeds = {v.name: np.load(f) for v, f in zip(session.get_inputs(), files, strict=True)}
folder = pathlib.Path(given.output) / given.output_dirname
folder.mkdir(exist_ok=True)
for i, out in enumerate(session.run(None, feeds)):
    np.save(folder / f"{pathlib.Path(files[0]).stem}_{i}.npy", out + float(os.environ.get("WRONG", 0)))
open(os.environ["CALLS"], "a").write(" ".join(["ais_bench", *sys.argv[1:]]) + "\\n")
"""


class Machine:
    """A folder with an artifact, and one with the tools."""

    def __init__(self, folder: Path, artifact: Path):
        self.artifact, self.calls_file = folder / "artifact", folder / "calls"
        shutil.copytree(artifact, self.artifact)
        self.tools = folder / "tools"
        self.tools.mkdir()
        for name, text in (("atc", ATC), ("bishengir-compile", COMPILER)):
            self.add_tool(name, text)
        (self.tools / "python3").symlink_to(sys.executable)
        (self.tools / "ais_bench").mkdir()
        (self.tools / "ais_bench" / "__init__.py").touch()
        (self.tools / "ais_bench" / "__main__.py").write_text(AIS_BENCH)

    def add_tool(self, name: str, text: str) -> None:
        """An executable on PATH."""
        (self.tools / name).write_text(f"#!{sys.executable}\n{text}")
        (self.tools / name).chmod(0o755)

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        """Run the script from another folder."""
        self.calls_file.write_text("")
        packages = str(Path(np.__file__).parent.parent)
        env = {"PATH": f"{self.tools}:/usr/bin:/bin", "PYTHONPATH": f"{self.tools}:{packages}", "CALLS": str(self.calls_file)}
        command = [str(self.artifact / SCRIPT), *options]
        return subprocess.run(command, env={**env, **environment}, cwd=self.tools, capture_output=True, text=True)

    @property
    def calls(self) -> list[str]:
        """The calls of the last run."""
        return self.calls_file.read_text().splitlines()


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    return emit(AscendTarget(), encoder_graph(), tmp_path_factory.mktemp("ascend") / "artifact").folder


@pytest.fixture
def machine(emitted, tmp_path):
    return Machine(tmp_path, emitted)


ONNX_CALL = (
    "atc --model=graph/model_atc.onnx --framework=5 --output=om/model --soc_version=Ascend910B3 --input_format=ND "
    "--input_shape=input_ids:-1,-1;attention_mask:-1,-1 --precision_mode_v2=origin --dynamic_dims=1,1,1,1;3,5,3,5"
)
BENCH_CALL = (
    "ais_bench --model om/model.om --input om/run/case_{0}/inputs/input_ids.npy,om/run/case_{0}/inputs/attention_mask.npy "
    "--output om/run --output_dirname case_{0} --outfmt NPY --device 0 --auto_set_dymdims_mode 1"
)


def test_it_builds_runs_and_compares_once(machine):
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert machine.calls == [ONNX_CALL, BENCH_CALL.format(0), BENCH_CALL.format(1)]
    assert "2 cases agree with ref/" in done.stdout and "case_1: " in done.stdout
    again = machine.run()
    assert again.returncode == 0, again.stderr
    assert machine.calls == [] and "om/model.om is there" in again.stdout
    assert machine.run("--force").returncode == 0 and len(machine.calls) == 3


def test_what_changed_is_built_again(machine):
    assert machine.run("--no-run").returncode == 0 and machine.calls == [ONNX_CALL]
    later = machine.artifact / "graph" / "weights.bin"
    newer = (machine.artifact / "om" / "model.om").stat().st_mtime + 5
    os.utime(later, (newer, newer))
    assert machine.run("--no-run").returncode == 0 and machine.calls == [ONNX_CALL]
    os.utime(later, (newer - 60, newer - 60))
    assert machine.run("--no-run").returncode == 0 and machine.calls == []
    other = machine.run("--no-run", "--soc", "Ascend910B4", "--precision", "fp16")
    assert other.returncode == 0
    assert machine.calls == [ONNX_CALL.replace("910B3", "910B4").replace("=origin", "=fp16")]


@pytest.mark.parametrize("suffix", [".o", "_reloc.o"])
def test_kernels_and_the_air_file_are_built_where_they_are(machine, suffix):
    kernel = machine.artifact / "kernels" / "attention"
    kernel.mkdir(parents=True)
    (kernel / "k.ttadapter.mlir").touch()
    command = "bishengir-compile k.ttadapter.mlir --target=Ascend910B3 -o k"
    (kernel / "use.json").write_text(json.dumps({"command": command}))
    (machine.artifact / "graph" / "model.air").touch()
    done = machine.run("--no-run", SUFFIX=suffix)
    assert done.returncode == 0, done.stderr
    air = "atc --model=graph/model.air --framework=1 --output=om/model_air --soc_version=Ascend910B3 --precision_mode_v2=origin"
    assert machine.calls == [ONNX_CALL, air, command]
    assert (kernel / f"k{suffix}").is_file() and (machine.artifact / "om" / "model_air.om").is_file()
    assert machine.run("--no-run", SUFFIX=suffix).returncode == 0 and machine.calls == []
    newer = (kernel / f"k{suffix}").stat().st_mtime + 5
    os.utime(kernel / "k.ttadapter.mlir", (newer, newer))
    assert machine.run("--no-run", SUFFIX=suffix).returncode == 0 and machine.calls == [command]


def test_sizes_are_profiles_and_one_alone_is_a_fixed_shape(machine):
    done = machine.run("--sizes", "batch=3 sequence=5")
    assert done.returncode == 0, done.stderr
    fixed = ONNX_CALL.replace("-1,-1", "3,5").rpartition(" --dynamic_dims")[0]
    assert machine.calls == [fixed, BENCH_CALL.format(1).rpartition(" --auto_set")[0]]
    assert "case_0: its shape is in no profile" in done.stdout
    assert machine.run("--no-run", "--sizes", "batch=1,8 sequence=128,256").returncode == 0
    assert machine.calls[0].endswith("--dynamic_dims=1,128,1,128;1,256,1,256;8,128,8,128;8,256,8,256")


def test_outputs_that_differ_fail(machine):
    done = machine.run(WRONG="0.5")
    assert done.returncode == 1 and "case_0: " in done.stderr and "limit 0.01" in done.stderr
    # What failed is run again.
    assert machine.run().returncode == 0 and machine.calls == [BENCH_CALL.format(0), BENCH_CALL.format(1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fast",), "unknown option --fast"),
        (("--soc",), "--soc wants a value"),
        (("--sizes", "batch=1"), "sequence: name each of batch, sequence and no other"),
        *(
            (("--sizes", f"sequence=4 {word}"), f"--sizes: {word}: wanted a name and positive numbers")
            for word in ("batch=1,x", "batch=0", "batch", "batch=1,", "batch=-1", "batch=1=2")
        ),
        (("--sizes", f"batch={','.join(map(str, range(1, 102)))} sequence=4"), "101 profiles, and ATC takes 100"),
        (("--sizes", "batch=7 sequence=7"), "no case of ref/ has a shape that was built"),
    ],
)
def test_mistakes_are_one_message(machine, options, message):
    done = machine.run(*options)
    assert done.returncode != 0 and message in done.stderr


def test_a_missing_or_failing_tool_is_one_message(machine):
    machine.add_tool("atc", "raise SystemExit(3)")
    done = machine.run()
    assert done.returncode == 1 and "atc failed" in done.stderr
    (machine.tools / "atc").unlink()
    done = machine.run()
    assert done.returncode == 1 and "atc is not on PATH: source CANN's set_env.sh" in done.stderr


def test_help_lists_the_options(machine):
    done = machine.run("--help")
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--force", "--no-run", "--soc", "--precision", "--sizes", "--limit"))


def test_shellcheck_finds_nothing(emitted):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install 'tilecut[dev]'")
    done = subprocess.run([found, str(emitted / SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


INTERFACE = """
import onnxruntime as ort
class InferSession:
    def __init__(self, device, path):
        assert path.endswith("om/model.om")
        self.session = ort.InferenceSession(path.replace("om/model.om", "graph/verify.onnx"), providers=["CPUExecutionProvider"])
    def infer(self, feeds, mode):
        assert mode == "dymdims", mode
        return self.session.run(None, {v.name: f for v, f in zip(self.session.get_inputs(), feeds, strict=True)})
"""


def test_a_built_model_is_loaded_through_ais_bench(machine, monkeypatch):
    assert machine.run("--no-run").returncode == 0
    (machine.tools / "ais_bench" / "infer").mkdir()
    (machine.tools / "ais_bench" / "infer" / "__init__.py").touch()
    (machine.tools / "ais_bench" / "infer" / "interface.py").write_text(INTERFACE)
    monkeypatch.syspath_prepend(str(machine.tools))
    session = load(machine.artifact)
    assert (session.device, session.how) == ("npu:0", "ais_bench")
    given = {name: np.ones((2, 4), np.int64) for name in ("input_ids", "attention_mask")}
    want = load(machine.artifact, device="reference").run(given)
    for name, value in session.run(given).items():
        np.testing.assert_array_equal(value, want[name])
    for name in [n for n in sys.modules if n.startswith("ais_bench")]:
        monkeypatch.delitem(sys.modules, name)
