"""`tilecut bench`: what is timed, what is compared, what is listed instead. No time is asserted."""

import functools
import json
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from checks import TinyMlp, compiled, randomise, tiny_bert
from tilecut import Artifact, PruneConfig, cli, compile_pruned, show
from tilecut.bench_artifacts import bench_artifacts, title_of
from tilecut.measure_memory import MemoryFailure, measure_memory
from tilecut_targets.open_peers import OPENERS
from tilecut_targets.peers import PEERS

FIGURES = {"cpu_ms", "cpu_p95_ms", "wall_ms", "p95_ms", "per_second", "times_first"}
ONNX = ("export", "ort", "onnxscript")


@pytest.fixture
def main(command):
    """`tilecut bench` with arguments."""
    return functools.partial(command, "bench")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    tiny_bert(width=16, neurons=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    config = PruneConfig(sparsity=0.5, method="magnitude", at={"sequence": 16})
    output = tmp_path_factory.mktemp("bench") / "tiny-edge"
    return compile_pruned(model, "edge", config=config, output=output, measure=False).path


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """An artifact of a model that has rows and no length."""
    return compiled(
        "edge",
        tmp_path_factory.mktemp("bench") / "mlp-edge",
        model=randomise(TinyMlp(neurons=64)),
        example_inputs=torch.randn(4, 12),
        calibration=None,
        config=None,
    ).path


@pytest.fixture(scope="module")
def beside_dense(model, artifact, tmp_path_factory):
    """One bench of everything that onnxruntime runs and torch eager, with all that is written."""
    output = tmp_path_factory.mktemp("bench") / "out" / "deep"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("sys.argv", [
        *("tilecut", "bench", str(artifact), "--dense", str(model), "--peers", ",".join(("eager", *ONNX))),
        *("--seq", "8,16", "--batch", "2,1", "--threads", "1,2", "--rounds", "2", "--output", str(output)),
    ])  # fmt: skip
    with monkeypatch.context(), pytest.raises(SystemExit) as stopped:
        cli.main()
    monkeypatch.undo()
    assert not stopped.value.code
    return output


def test_everything_is_timed_at_every_point_of_the_grid(beside_dense, artifact):
    held = json.loads((beside_dense / "bench.json").read_text())
    names = [str(artifact), "dense, same path", *(f"dense, {PEERS[name].title}" for name in ("eager", *ONNX))]
    assert [c["name"] for c in held["contenders"]] == names
    assert not held["not_run"] and not held["notes"]
    points = [(b, s, t) for t in (1, 2) for b in (2, 1) for s in (8, 16)]
    assert [(r["contender"], r["batch"], r["sequence"], r["threads"]) for r in held["timings"]] == [
        (name, *point) for point in points for name in names
    ]
    for row in held["timings"]:
        assert (row["status"], row["rounds"], row["unit"], row["base"]) == ("timed", 2, "tokens", names[0])
        assert all(row[name] > 0 for name in FIGURES)
        assert row["error"] < 1e-4
        ms = row["cpu_ms"] if row["threads"] == 1 else row["wall_ms"]
        assert row["per_second"] == pytest.approx(1e3 * row["batch"] * row["sequence"] / ms, rel=0.01)
    assert [r["times_first"] for r in held["timings"] if r["contender"] == names[0]] == [1.0] * 8


def test_the_report_says_what_was_measured_and_with_what(beside_dense, artifact):
    held = json.loads((beside_dense / "bench.json").read_text())
    assert held["format"] == 1 and {"cpu", "cores"} <= held["machine"].keys()
    assert {"torch", "onnxruntime", "onnxscript", "python"} <= held["tools"].keys()
    assert held["command"].startswith("tilecut bench ") and "--seq 8,16" in held["command"]
    by_name = {c["name"]: c for c in held["contenders"]}
    own, dense = by_name[str(artifact)], by_name["dense, same path"]
    assert own["bytes"] == (artifact / "model.onnx").stat().st_size < dense["bytes"]
    assert (own["kind"], own["target"]) == ("artifact", "edge")
    eager = by_name["dense, torch eager"]
    assert (eager["kind"], eager["target"], eager["model"]) == ("peer", None, "dense, same path")
    # A process that holds numpy and onnxruntime, and one that holds torch.
    assert 10e6 < own["peak_memory_bytes"] < eager["peak_memory_bytes"]
    assert by_name["dense, torch's export"]["peak_memory_bytes"] < eager["peak_memory_bytes"] - 50e6


def test_the_chart_is_a_png_with_a_panel_for_every_point(beside_dense):
    data = (beside_dense / "bench.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    # Eight panels in rows of three.
    assert width > 1500 and height > 900


def test_the_tables(beside_dense, artifact, capsys):
    held = json.loads((beside_dense / "bench.json").read_text())
    show.bench(Console(width=200, no_color=True), held)
    shown = capsys.readouterr().out
    for word in ("batch 2, sequence 8, 1 thread: CPU time counts", "2 threads: wall time counts", "tokens/s", "p95",
                 "dense, ONNX Script's optimizer", "peak memory, MB", str(artifact)):  # fmt: skip
        assert word in shown, word
    assert "not run" not in shown and "differs" not in shown


def test_without_dense_the_peers_run_the_artifacts_own_model(artifact, main):
    code, out, _ = main(artifact, "--peers", "eager,export", "--seq", "8", "--rounds", "1", "--no-memory", "--json")
    held = json.loads(out)
    assert code == 0
    assert [c["name"] for c in held["contenders"][1:]] == ["same model, torch eager", "same model, torch's export"]
    # The pruned weights, not the dense ones.
    assert held["contenders"][1]["bytes"] < 1.5 * (artifact / "model.safetensors").stat().st_size
    assert all(r["error"] < 1e-4 for r in held["timings"])
    assert held["memory"] is None and held["contenders"][0]["peak_memory_bytes"] is None


def test_several_artifacts_each_have_their_peers(artifact, vision):
    made = bench_artifacts([artifact, vision], sequence=[8], rounds=1, peers=["eager"], memory=False)
    names = [str(artifact), str(vision), f"{artifact}, torch eager", f"{vision}, torch eager"]
    assert [(r["contender"], r["unit"]) for r in made["timings"]] == list(zip(names, ["tokens", "items"] * 2))


def test_a_model_without_a_length_has_items_and_no_sequence(vision, main):
    code, out, _ = main(vision, "--batch", "3", "--seq", "7,9", "--rounds", "1", "--no-memory", "--json")
    (row,) = json.loads(out)["timings"]
    assert code == 0 and (row["batch"], row["sequence"], row["unit"]) == (3, None, "items")
    assert row["per_second"] == pytest.approx(3e3 / row["cpu_ms"], rel=0.05)
    code, out, _ = main(vision, "--batch", "3", "--rounds", "1", "--no-memory")
    assert code == 0 and "batch 3, 1 thread" in out and "items/s" in out


@pytest.mark.parametrize("name", ["openvino", "executorch"])
def test_a_peer_that_is_not_installed_is_listed_with_the_reason(name, artifact, main, monkeypatch):
    # Parts of it that are loaded would still be found.
    for held in [name, *(one for one in sys.modules if one.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, held, None)
    code, out, _ = main(artifact, "--peers", f"{name},export", "--seq", "8", "--rounds", "1", "--no-memory", "--json")
    held = json.loads(out)
    assert code == 0
    assert held["not_run"] == [
        {"contender": f"same model, {PEERS[name].title}", "why": f"not installed: pip install {name}"}
    ]
    assert [r["contender"] for r in held["timings"]] == [str(artifact), "same model, torch's export"]
    code, out, _ = main(artifact, "--peers", name, "--seq", "8", "--rounds", "1", "--no-memory")
    assert f"not run: same model, {PEERS[name].title}: not installed: pip install {name}" in out


@pytest.mark.parametrize("name", ["openvino", "executorch"])
def test_a_peer_that_is_installed_runs(name, artifact):
    pytest.importorskip(name)
    made = bench_artifacts([artifact], batch=[1, 3], sequence=[1, 8], threads=[1, 2], rounds=1, peers=[name])
    rows = [r for r in made["timings"] if r["contender"] != str(artifact)]
    assert not made["not_run"] and not made["notes"] and len(rows) == 8
    assert all(r["status"] == "timed" and r["error"] < 1e-4 for r in rows)
    assert made["contenders"][1]["peak_memory_bytes"] > 10e6 and made["contenders"][1]["bytes"] > 100_000


@pytest.mark.slow
def test_torch_compile_runs_at_more_shapes_than_torch_caches(artifact):
    lengths = list(range(2, 13))
    made = bench_artifacts([artifact], sequence=lengths, rounds=1, peers=["compile"], memory=False)
    assert not made["not_run"]
    rows = [r for r in made["timings"] if r["contender"] == "same model, torch.compile"]
    assert [r["sequence"] for r in rows] == lengths and all(r["error"] < 1e-4 for r in rows)


def test_a_compiler_that_is_missing_is_the_reason(artifact, monkeypatch):
    def no_compiler(folder, threads):
        def run(arrays):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a page of advice")

        return run

    monkeypatch.setitem(OPENERS, "compile", no_compiler)
    made = bench_artifacts([artifact], sequence=[8], rounds=1, peers=["compile"], memory=False)
    (left,) = made["not_run"]
    assert left["why"] == "RuntimeError: InvalidCxxCompiler: No working C++ compiler found"
    assert [r["contender"] for r in made["timings"]] == [str(artifact)]


def test_a_peer_that_computes_something_else_is_reported_and_not_timed(artifact, monkeypatch, capsys):
    right = OPENERS["export"]
    calls = []

    def wrong(folder, threads):
        run = right(folder, threads)

        def off(arrays):
            calls.append(1)
            return {name: value + np.float32(0.1) for name, value in run(arrays).items()}

        return off

    monkeypatch.setitem(OPENERS, "export", wrong)
    made = bench_artifacts([artifact], sequence=[8], rounds=3, peers=["export", "eager"], memory=False)
    row = next(r for r in made["timings"] if r["contender"] == "same model, torch's export")
    assert row["status"] == "differs" and row["error"] > 1e-3 and all(row[name] is None for name in FIGURES)
    # The comparison, and no more.
    assert len(calls) == 1
    assert [r["status"] for r in made["timings"]] == ["timed", "differs", "timed"]
    show.bench(Console(width=200, no_color=True), {**made, "command": ""})
    shown = capsys.readouterr().out
    assert "differs: same model, torch's export is" in shown and "not timed" in shown


def test_padding_is_compared_too(artifact, monkeypatch):
    """A peer that ignores the mask is right on whole inputs alone, and bench does not compare on those."""
    right = OPENERS["export"]

    def blind(folder, threads):
        run = right(folder, threads)
        return lambda arrays: run({**arrays, "attention_mask": np.ones_like(arrays["attention_mask"])})

    monkeypatch.setitem(OPENERS, "export", blind)
    made = bench_artifacts([artifact], batch=[4], sequence=[16], rounds=1, peers=["export"], memory=False)
    assert made["timings"][1]["status"] == "differs"


def test_an_artifact_that_is_wrong_is_reported_and_nothing_is_relative_to_it(artifact, monkeypatch):
    from tilecut import bench_artifacts as module

    right = module.open_artifact

    def doubled(*given):
        run = right(*given)
        return lambda arrays: {name: 2 * value for name, value in run(arrays).items()}

    monkeypatch.setattr(module, "open_artifact", doubled)
    made = bench_artifacts([artifact], sequence=[8], rounds=1, peers=["eager"], memory=False)
    wrong, eager = made["timings"]
    assert wrong["status"] == "differs" and wrong["times_first"] is None
    assert eager["base"] == "same model, torch eager" and eager["times_first"] == 1.0


def test_memory_that_cannot_be_measured_is_a_note(artifact, monkeypatch, capsys):
    def fail(contender):
        raise MemoryFailure("memory", "the process ended with code -9")

    monkeypatch.setattr("tilecut.bench_artifacts.measure_memory", fail)
    made = bench_artifacts([artifact], sequence=[8], rounds=1)
    assert made["contenders"][0]["peak_memory_bytes"] is None
    assert made["notes"] == [f"{artifact}: memory: the process ended with code -9"]
    show.bench(Console(width=200, no_color=True), made)
    assert "the process ended with code -9" in capsys.readouterr().out


def test_memory_grows_with_what_a_run_takes(artifact, tmp_path):
    def peak(length):
        inputs = {s.name: np.ones((16, length), s.dtype) for s in Artifact(artifact).manifest.inputs}
        np.savez(tmp_path / "inputs.npz", **inputs)
        return measure_memory(
            {"artifact": str(artifact), "device": None, "threads": 1, "inputs": str(tmp_path / "inputs.npz")}
        )

    small, large = peak(4), peak(512)
    # The scores of one attention alone: 16 rows, at least one head, 512 x 512.
    assert large - small > 16 * 512 * 512 * 4


def test_a_measured_process_that_fails_says_why(artifact, tmp_path):
    with pytest.raises(MemoryFailure, match=r"absent\.npz"):
        measure_memory(
            {"artifact": str(artifact), "device": None, "threads": 1, "inputs": str(tmp_path / "absent.npz")}
        )


def test_torchs_threads_are_as_before(artifact):
    before = torch.get_num_threads()
    bench_artifacts([artifact], sequence=[8], threads=[before + 1], rounds=1, peers=["eager"], memory=False)
    assert torch.get_num_threads() == before


def test_the_graph_of_an_artifact_is_its_module(artifact):
    opened = Artifact(artifact)
    graph = opened.graph()
    assert graph.input_specs() == opened.manifest.inputs and graph.output_specs() == opened.manifest.outputs
    assert graph.ranges == opened.manifest.dims
    ids = torch.randint(0, 99, (3, 11))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        want = opened.module()(**inputs)
    for name, value in graph.run(inputs).items():
        assert torch.equal(value, want[name])


def test_titles():
    assert title_of((1, 128, 1)) == "batch 1, sequence 128, 1 thread: CPU time"
    assert title_of((8, None, 2)) == "batch 8, 2 threads: wall time"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("{artifact}", "--peers", "jax"),
            "--peers: unknown peer; got 'jax'; wanted all, none or of eager, compile, export",
        ),
        (("{artifact}", "--peers", "all,none"), "unknown peer; got 'all'"),
        (("{artifact}", "--seq", "513"), "the model does not allow that size; got 513; wanted 1 to 512"),
        (("{artifact}", "--threads", "0"), "--threads: sizes must be positive; got '0'"),
        (("{artifact}", "--threads", "1,9999"), "--threads: too large; got 9999; wanted 1 to 1024"),
        (("{artifact}", "--batch", "0"), "--batch: sizes must be positive"),
        (("{model}",), "manifest.json"),
        (("{artifact}", "--dense", "{artifact}/ref"), "not the folder of a Hugging Face model"),
        (("{artifact}", "--output", "{artifact}/model.onnx"), "--output: no folder can be made there"),
        (("{artifact}", "--device", "tpu"), "runs on the CPU"),
    ],
)
def test_errors_are_one_line(arguments, message, artifact, model, main):
    code, out, err = main(*(a.format(artifact=artifact, model=model) for a in arguments))
    assert code == 1 and message in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1
    assert "Traceback" not in out + err


def test_matplotlib_is_wanted_for_a_chart_alone(artifact, main, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = main(artifact, "--rounds", "1", "--output", tmp_path / "out")
    assert code == 1 and "bench: matplotlib is not installed; pip install 'tilecut[explore]'" in err
    assert not (tmp_path / "out").exists()
    assert main(artifact, "--rounds", "1", "--seq", "8", "--no-memory")[0] == 0


def test_without_torch_artifacts_are_timed_and_not_compared(artifact, main, monkeypatch):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else found(name))
    code, out, _ = main(artifact, "--rounds", "1", "--seq", "8", "--no-memory", "--json")
    (row,) = json.loads(out)["timings"]
    assert code == 0 and row["error"] is None and row["status"] == "timed"
