"""Every test runs offline, on fixed seeds, and without progress bars."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers run side by side: one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import gc
import shutil
import tempfile
from pathlib import Path

# Tables that tests measure are kept apart from the user's.
if "TILECUT_CACHE" not in os.environ:
    os.environ["TILECUT_CACHE"] = tempfile.mkdtemp(prefix="tilecut-tests-")
    atexit.register(shutil.rmtree, os.environ["TILECUT_CACHE"], ignore_errors=True)
    # The private environments take minutes to make: the user's are used.
    toolchains = Path.home() / ".cache" / "tilecut" / "toolchains"
    if toolchains.is_dir():
        (Path(os.environ["TILECUT_CACHE"]) / "toolchains").symlink_to(toolchains)

import hypothesis
import pytest
import torch

import checks

# torch.export makes millions of small objects; collecting them often is a quarter of its time.
gc.set_threshold(100_000, 50, 50)

# The explain phase traces every line that runs, torch's included.
phases = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain]
hypothesis.settings.register_profile(
    "tilecut", deadline=None, phases=phases, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("tilecut")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests whose environment, `toolchain("ascend-kernels")`, is not installed here."""
    from tilecut_targets.ascend.environments import INSTALL, is_installed

    for item in items:
        for mark in item.iter_markers("toolchain"):
            missing = [name for name in mark.args if not is_installed(name)]
            if missing:
                item.add_marker(pytest.mark.skip(f"no {' and '.join(missing)}: run `{INSTALL}`"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def edge_artifact(tmp_path_factory: pytest.TempPathFactory):
    """A tiny BERT compiled for edge at sparsity 0.5; look, don't touch (copy the folder to change it)."""
    return checks.compiled("edge", tmp_path_factory.mktemp("edge") / "artifact", measure=True)


@pytest.fixture(scope="session")
def cuda_artifact(tmp_path_factory: pytest.TempPathFactory):
    return checks.compiled("cuda", tmp_path_factory.mktemp("cuda") / "artifact")


@pytest.fixture(scope="session")
def ascend_artifact(tmp_path_factory: pytest.TempPathFactory):
    return checks.compiled("ascend", tmp_path_factory.mktemp("ascend") / "artifact")


@pytest.fixture
def command(monkeypatch, capsys):
    """The whole command line with its error handling: arguments in, (exit code, stdout, stderr) out."""
    from tilecut import cli

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["tilecut", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        return stopped.value.code or 0, shown.out, shown.err

    return call
