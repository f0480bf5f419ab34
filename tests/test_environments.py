"""The private environments: built once, whole or not at all, and what goes wrong in them in one line."""

import json
import threading
import time
from pathlib import Path

import pytest

from tilecut_runtime.errors import ConfigError, LoweringError
from tilecut_targets.ascend import environments
from tilecut_targets.ascend.environments import ENVIRONMENTS, Environment, call, folder_of, install, installed, remove

CHECK = "import json, sys\nprint('noise')\nprint(json.dumps({'versions': {'python': sys.version.split()[0]}}))\n"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An environment "small" that installs nothing, in a cache and with scripts of its own."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "check.py").write_text(CHECK)
    monkeypatch.setenv("TILECUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environments, "SCRIPTS", scripts)
    monkeypatch.setitem(ENVIRONMENTS, "small", Environment(installs=(), check="check.py"))
    return scripts


def script(folder: Path, text: str) -> Path:
    path = folder / "asked.py"
    path.write_text(text)
    return path


def test_it_is_built_listed_reused_and_removed(small):
    assert installed() == []
    told = []
    folder = install("small", told.append)
    assert folder == folder_of("small") and told[0] == "small: making a virtual environment"
    (one,) = installed()
    assert (one.name, one.folder, one.current) == ("small", folder, True)
    assert one.bytes > 10_000 and one.versions["python"].startswith("3.")
    made = folder.stat().st_ino
    assert install("small", told.append).stat().st_ino == made and told[-1] == f"small: checking {folder}"
    assert remove("small") == one.bytes and installed() == [] and not folder.exists()
    assert remove("small") == 0


def test_what_a_script_answers(small):
    install("small")
    echo = script(small, "import json, sys\nprint('a note')\nprint(json.dumps({'got': json.load(sys.stdin)}))")
    assert call("small", echo, {"a": [1, "ö"]}, 30) == {"got": {"a": [1, "ö"]}}


def test_scripts_do_not_see_the_callers_packages(small, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(small))
    (small / "tilecut_secret.py").write_text("")
    install("small")
    body = "import importlib.util, json\nprint(json.dumps({n: bool(importlib.util.find_spec(n)) for n in %r}))"
    (small / "apart").mkdir()
    found = call("small", script(small / "apart", body % ["tilecut_secret", "torch", "json"]), {}, 30)
    assert found == {"tilecut_secret": False, "torch": False, "json": True}


def test_a_missing_environment_names_the_command(small):
    with pytest.raises(
        ConfigError, match="small: this private environment is not installed; run `tilecut toolchain install"
    ):
        call("small", small / "check.py", {}, 30)


def test_a_script_that_fails_is_quoted(small):
    install("small")
    with pytest.raises(LoweringError, match=r"asked: failed with exit code 1; got .*ValueError: tile of 7") as caught:
        call("small", script(small, "raise ValueError('tile of 7')"), {}, 30)
    assert "\n" not in str(caught.value)
    with pytest.raises(LoweringError, match="no JSON object"):
        call("small", script(small, "print('hello')"), {}, 30)


def test_a_script_that_hangs_is_stopped_with_all_it_started(small, tmp_path):
    install("small")
    started = tmp_path / "pid"
    body = f"""import subprocess, time
child = subprocess.Popen(["sleep", "60"])
open({str(started)!r}, "w").write(str(child.pid))
time.sleep(60)"""
    began = time.monotonic()
    with pytest.raises(LoweringError, match="asked: ran out of time and was stopped; wanted at most 2 s"):
        call("small", script(small, body), {}, 2)
    assert time.monotonic() - began < 20
    state = Path(f"/proc/{started.read_text()}/stat")
    # What was killed may take a moment to go.
    while time.monotonic() - began < 20 and state.exists() and state.read_text().split()[2] != "Z":
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_does_not_pass_its_check_is_not_kept(small):
    (small / "check.py").write_text("raise ImportError('libascend.so')")
    with pytest.raises(ConfigError, match=r"toolchain small: cannot be built .*libascend\.so"):
        install("small")
    assert installed() == []
    assert [p for p in environments.toolchains().iterdir() if p.is_dir()] == []


def test_what_pip_says_is_quoted(small, monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, "small", Environment((("--no-index", "no-such-package==1"),), "check.py"))
    with pytest.raises(ConfigError, match=r"pip: failed .*No matching distribution found for no-such-package==1"):
        install("small")


def test_a_damaged_environment_is_built_again(small):
    folder = install("small")
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").write_text("#!/bin/sh\nexit 3\n")
    (folder / "bin" / "python").chmod(0o755)
    told = []
    assert install("small", told.append) == folder
    assert any("built again" in line for line in told)
    assert call("small", small / "check.py", {}, 30)["versions"]


def test_other_pins_are_another_environment(small, monkeypatch):
    old = install("small")
    (small / "finish.py").write_text(
        "import json, sys\nasked = json.load(sys.stdin)\nopen(asked['folder'] + '/stub', 'w')\nprint('{}')"
    )
    monkeypatch.setitem(ENVIRONMENTS, "small", Environment((), "check.py", finish="finish.py"))
    assert not environments.is_installed("small")
    new = install("small")
    assert new != old and (new / "stub").is_file()
    assert {one.folder: one.current for one in installed()} == {old: False, new: True}
    before = folder_of("small")
    (small / "finish.py").write_text("print('{}')")
    assert folder_of("small") != before
    remove("small")
    assert installed() == []


def test_two_installs_at_once_make_one(small):
    folders, told = [], []
    threads = [threading.Thread(target=lambda: folders.append(install("small", told.append))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(installed()) == 1
    assert sum("making" in line for line in told) == 1


def test_variables_name_the_folder(small, monkeypatch):
    environment = Environment((), "check.py", variables={"LD_LIBRARY_PATH": "{folder}/stubs"})
    monkeypatch.setitem(ENVIRONMENTS, "small", environment)
    folder = install("small")
    body = "import json, os\nprint(json.dumps({'path': os.environ['LD_LIBRARY_PATH']}))"
    assert call("small", script(small, body), {}, 30) == {"path": f"{folder}/stubs"}


def test_a_newer_python_asks_for_one_that_fits(small, monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, "small", Environment((), "check.py", newest_python=(3, 2)))
    with pytest.raises(ConfigError, match=r"no Python that the pinned wheels are made for; got .*wanted python3\.2"):
        install("small")


def test_names():
    assert environments.names_of("ascend") == ["ascend-kernels", "ascend-air"]
    assert environments.names_of("ascend-air") == ["ascend-air"]
    with pytest.raises(ConfigError, match="unknown toolchain; got 'cuda'; wanted ascend, ascend-kernels, ascend-air"):
        environments.names_of("cuda")


@pytest.mark.toolchain("ascend-kernels")
def test_the_real_one_passes_its_check():
    record = json.loads((folder_of("ascend-kernels") / environments.RECORD).read_text())
    found = call("ascend-kernels", environments.SCRIPTS / ENVIRONMENTS["ascend-kernels"].check, {}, 300)["versions"]
    assert found == record["versions"] and found["triton-ascend"] == "3.2.0"
