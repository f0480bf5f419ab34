import json
import re
import shutil

import numpy as np
import onnx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from checks import minilm_folder, text_batch, tiny_bert
from tilecut import cli, show
from tilecut_runtime.manifest import Manifest, list_files


def run(*arguments):
    """Run the command as the shell would: exit code, stdout, stderr."""
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    tiny_bert(width=16, neurons=256, vocab=30522).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(minilm_folder() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(f"this is text number {i}" for i in range(100)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compiled(model_folder, texts, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "artifact"
    arguments = ["compile", model_folder, "--output", output, "--calibration", texts, "--sparsity", "0.5"]
    return output, run(*arguments, "--preset", "edge", "--sequence", "16", "--block", "16")


def test_compile_prints_the_table_and_where_everything_is(compiled):
    output, result = compiled
    assert result.exit_code == 0, result.output
    for word in ("prunable MACs", "parameters", "CPU ms", "kept heads:", "verification", "report.html", str(output)):
        assert word in result.output, word
    for stage in ("capture", "score (table)", "reconstruct", "verify", "latency"):
        assert stage in result.output, stage
    report = json.loads((output / "report.json").read_text())
    assert report["config"]["sparsity"] == 0.5 and report["config"]["block"] == 16


def test_compile_json_is_one_object(model_folder, texts, tmp_path, compiled, command):
    budget = json.loads((compiled[0] / "report.json").read_text())["parameters"]["dense"] - 20_000
    code, out, _ = command(
        "compile",
        model_folder,
        "--output",
        tmp_path / "a",
        "--calibration",
        texts,
        "--max-params",
        budget,
        "--no-measure",
        "--json",
    )
    held = json.loads(out)
    assert code == 0 and held["path"] == str(tmp_path / "a")
    assert held["report"]["parameters"]["pruned"] <= budget
    # The preset's sparsity gave way to the budget that was asked for.
    assert held["report"]["config"]["sparsity"] is None


@pytest.fixture(scope="module")
def explored(model_folder, texts, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "front"
    arguments = ["explore", model_folder, "--target", "cuda", "--output", output, "--calibration", texts]
    return output, run(
        *arguments, "--sparsities", "0.3,0.6,0.99", "--sequence", "16", "--block", "64", "--method", "wanda"
    )


def test_explore_prints_the_front(explored):
    output, result = explored
    assert result.exit_code == 0, result.output
    shown = result.output
    for word in ("cosine", "milliseconds", "calculated", "dense", "sparsity-0.3", "sparsity-0.6", "front", "explore.html"):
        assert word in shown, word
    assert "sparsity-0.99: search: no legal model fits" in shown
    for stage in ("capture", "score (wanda)", "sweep"):
        assert stage in shown, stage
    held = json.loads((output / "explore.json").read_text())
    assert held["config"]["block"] == 64 and held["config"]["at"] == {"sequence": 16}
    assert [p["name"] for p in held["points"]] == ["dense", "sparsity-0.3", "sparsity-0.6", "sparsity-0.99"]


def test_the_knee_is_marked(explored, capsys):
    report = json.loads((explored[0] / "explore.json").read_text())
    # The table alone: which point is the knee depends on the model.
    shown = Console(width=160, no_color=True)
    show.front(shown, {**report, "knee": "sparsity-0.3"})
    rows = [line for line in capsys.readouterr().out.splitlines() if "knee" in line]
    assert len(rows) == 1 and "sparsity-0.3" in rows[0]


def test_explore_json_is_one_object(model_folder, texts, tmp_path, command):
    arguments = ["explore", model_folder, "--target", "cuda", "--output", tmp_path / "f", "--calibration", texts]
    code, out, _ = command(*arguments, "--sparsities", "0.5", "--sequence", "16", "--method", "magnitude", "--json")
    held = json.loads(out)
    assert code == 0 and held["path"] == str(tmp_path / "f")
    assert held["report"] == json.loads((tmp_path / "f" / "explore.json").read_text())


def test_only_the_main_process_prints(explored, monkeypatch, command, model_folder):
    class Found:
        path, report = explored[0], json.loads((explored[0] / "explore.json").read_text())

    monkeypatch.setattr("tilecut.explore.explore", lambda *given, **options: Found)
    assert "sparsity-0.3" in command("explore", model_folder)[1]
    monkeypatch.setenv("RANK", "1")
    assert command("explore", model_folder) == (0, "", "")
    assert command("explore", model_folder, "--json") == (0, "", "")


def test_inspect(compiled, command):
    output, _ = compiled
    code, out, _ = command("inspect", output)
    assert code == 0
    for word in ("input_ids", "last_hidden_state", "model.onnx", "prunable MACs", "passed"):
        assert word in out, word
    code, out, _ = command("inspect", output, "--json")
    assert json.loads(out)["manifest"]["target"] == "edge"


def test_verify_and_its_exit_codes(compiled, tmp_path, command):
    output, _ = compiled
    code, out, _ = command("verify", output)
    assert code == 0 and "artifact equals" in out and "failed" not in out
    code, out, _ = command("verify", output, "--device", "cpu", "--json")
    assert code == 0 and [r["status"] for r in json.loads(out)["rungs"]] == ["passed", "passed"]

    broken = shutil.copytree(output, tmp_path / "broken")
    (broken / "plan.json").write_text("{}")
    code, _, err = command("verify", broken)
    assert code == 1 and "plan.json" in err and len(err.strip().splitlines()) == 1

    wrong = shutil.copytree(output, tmp_path / "wrong")
    model = onnx.load(wrong / "model.onnx")
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) == 2:
            weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.1, weight.name))
    onnx.save(model, wrong / "model.onnx")
    manifest = Manifest.read(wrong)
    manifest.files = list_files(wrong)
    manifest.write(wrong)
    code, out, _ = command("verify", wrong)
    assert code == 3 and "failed" in out


def test_bench_times_several_side_by_side(compiled, command):
    output, _ = compiled
    code, out, _ = command("bench", output, output, "--batch", "1,2", "--sequence", "8", "--rounds", "2", "--no-memory", "--json")
    rows = json.loads(out)["timings"]
    assert code == 0 and [(r["batch"], r["sequence"], r["rounds"]) for r in rows] == [(1, 8, 2)] * 2 + [(2, 8, 2)] * 2
    assert [r["contender"] for r in rows[:2]] == [f"{output} #1", f"{output} #2"]
    assert all(r["cpu_ms"] > 0 for r in rows)
    code, out, _ = command("bench", output, "--rounds", "1", "--json")
    assert code == 0 and [r["contender"] for r in json.loads(out)["timings"]] == [str(output)]
    code, out, _ = command("bench", output, "--rounds", "1", "--no-memory")
    assert code == 0 and "CPU ms" in out


def test_run_on_texts_and_arrays(compiled, tmp_path, command):
    output, _ = compiled
    code, out, _ = command(
        "run", output, "--text", "a font", "--text", "a longer text about fonts", "--outputs", tmp_path / "o.npz"
    )
    assert code == 0 and "last_hidden_state: float32 [2, 8, 64]" in out
    with np.load(tmp_path / "o.npz") as held:
        first = held["last_hidden_state"]
    assert first.shape == (2, 8, 64)
    np.savez(tmp_path / "i.npz", **{k: v.numpy() for k, v in text_batch(3, 5).items()})
    code, out, _ = command("run", output, "--inputs", tmp_path / "i.npz", "--threads", "1", "--json")
    assert code == 0 and json.loads(out)["outputs"]["pooler_output"] == {"dtype": "float32", "shape": [3, 64]}


def test_targets(command):
    code, out, _ = command("targets")
    assert code == 0 and all(name in out for name in ("edge", "cuda", "ascend"))
    code, out, _ = command("targets", "--json")
    assert set(json.loads(out)["targets"]) == {"edge", "cuda", "ascend"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "{model}", "--target", "tpu"), "unknown target; got 'tpu'"),
        (("compile", "{model}", "--sparsity", "1.5"), "bad sparsity; got 1.5"),
        (("compile", "{model}", "--preset", "huge"), "unknown preset; got 'huge'"),
        (("compile", "{model}", "--kinds", "heads,toes"), "kind 'toes' is none of"),
        (("compile", "{model}", "--kinds", ""), "kind '' is none of"),
        (("compile", "{model}", "--sequence", "0"), "must be positive"),
        (("compile", "{model}", "--calibration", "absent.tsv"), "no such calibration file"),
        (("compile", "{model}", "--min-units", "heads"), "not a name and a number; got 'heads'"),
        (("compile", "absent"), "no config.json"),
        (("explore", "{model}", "--sparsities", "half"), "not a comma-separated list of numbers; got 'half'"),
        (("explore", "{model}", "--sparsities", "0.5,2"), "bad sparsity; got 2.0"),
        (("explore", "{model}", "--sparsities", "0.5", "--latencies-ms", "3"), "wanted one of them"),
        (("explore", "{model}", "--output", "{artifact}"), "exists and is no exploration"),
        (("inspect", "absent"), "absent"),
        (("verify", "{model}"), "manifest.json"),
        (("run", "{artifact}"), "give either --inputs or --text"),
        (("run", "{artifact}", "--inputs", "absent.npz"), "cannot be read as .npz"),
        (("run", "{artifact}", "--text", "x", "--device", "tpu"), "runs on the CPU"),
        (("bench", "{artifact}", "--batch", "one"), "not a comma-separated list of integers; got 'one'"),
        (("compile", "{model}", "--target", "cuda:sm_70"), "knows no such chip or type; got cuda:sm_70"),
        (("build", "{artifact}"), "only a cuda artifact has a native package"),
        (("tune", "--widths", "65"), "tune: no"),
        (("tune", "--widths", "many"), "not a comma-separated list of integers; got 'many'"),
        (
            ("bench", "{artifact}", "--sequence", "9999"),
            "the model does not allow that size; got 9999; wanted 1 to 512",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments, message, compiled, model_folder, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    given = [a.format(model=model_folder, artifact=compiled[0]) for a in arguments]
    code, out, err = command(*given)
    assert code == 1
    assert message in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def test_json_errors_are_json(command):
    code, out, err = command("inspect", "absent", "--json")
    assert code == 1 and json.loads(out)["error"]["kind"] == "ArtifactError" and "absent" in err


def test_wrong_usage_is_exit_code_2(command):
    assert command("compile")[0] == 2
    assert command("fly")[0] == 2
    assert command("bench", "x", "--rounds", "0")[0] == 2
    for threads in ("0", "-1", "1025"):
        assert command("run", "x", "--threads", threads)[0] == 2


def test_help_and_version(command):
    code, out, _ = command("--version")
    assert code == 0 and re.fullmatch(r"tilecut \d+\.\d+\.\d+\n", out)
    for name in ("compile", "explore", "inspect", "verify", "bench", "run", "build", "tune", "targets"):
        assert command(name, "--help")[0] == 0
        assert name in command("--help")[1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}'])
def test_a_damaged_report_is_one_error(content, compiled, tmp_path, command):
    broken = shutil.copytree(compiled[0], tmp_path / "broken")
    (broken / "report.json").write_text(content)
    code, out, err = command("inspect", broken)
    assert code == 1 and "report.json" in err and "Traceback" not in out + err
