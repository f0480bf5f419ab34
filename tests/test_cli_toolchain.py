"""`tilecut toolchain`: install, list and remove, in words and as JSON."""

import json

import pytest
from typer.testing import CliRunner

from tilecut import cli
from tilecut_targets.ascend import environments
from tilecut_targets.ascend.environments import ENVIRONMENTS, Environment

CHECK = "import json\nprint(json.dumps({'versions': {'compiler': '1.2.3'}}))\n"


@pytest.fixture(autouse=True)
def _two_small_ones(monkeypatch, tmp_path):
    (tmp_path / "check.py").write_text(CHECK)
    monkeypatch.setenv("TILECUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environments, "SCRIPTS", tmp_path)
    for name in list(ENVIRONMENTS):
        monkeypatch.setitem(ENVIRONMENTS, name, Environment(installs=(), check="check.py"))


def run(*arguments):
    return CliRunner().invoke(cli.app, ["toolchain", *arguments])


def test_install_list_remove():
    assert "no private environment is installed" in run("list").stdout
    made = run("install", "ascend")
    assert made.exit_code == 0
    assert "ascend-kernels: making a virtual environment" in made.stderr and "making" not in made.stdout
    assert "ascend-air" in made.stdout and "compiler 1.2.3" in made.stdout
    again = run("install", "ascend")
    assert "ascend-air: checking" in again.stderr and "making" not in again.stderr
    assert run("list").stdout == again.stdout
    assert "ascend-kernels: 0 MB freed" in run("remove", "ascend-kernels").stdout
    assert "ascend-kernels" not in run("list").stdout
    assert "ascend-kernels: not installed" in run("remove", "ascend").stdout


def test_as_json():
    made = json.loads(run("install", "ascend-air", "--json").stdout)["toolchains"]
    assert [one["name"] for one in made] == ["ascend-air"]
    assert made == json.loads(run("list", "--json").stdout)["toolchains"]
    assert made[0]["bytes"] > 1000 and made[0]["versions"] == {"compiler": "1.2.3"} and made[0]["current"]
    assert json.loads(run("remove", "ascend-air", "--json").stdout) == {"freed_bytes": {"ascend-air": made[0]["bytes"]}}


def test_errors_are_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "check.py").write_text("raise ImportError('libascend_hal.so')")
    for arguments, message in (
        (("install", "cuda"), "unknown toolchain; got 'cuda'"),
        (("install", "ascend-air"), "ImportError: libascend_hal.so"),
    ):
        monkeypatch.setattr("sys.argv", ["tilecut", "toolchain", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 1 and message in shown[-1] and shown[-1].startswith("error:")
