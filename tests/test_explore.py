import base64
import json
from dataclasses import dataclass

import pytest
import torch

from checks import TinyMlp, randomise
from tilecut import PruneConfig, compile_pruned
from tilecut.exploration import Exploration
from tilecut.explore import explore
from tilecut.find_front import find_front
from tilecut.progress import Progress
from tilecut_runtime.errors import ArtifactError, CalibrationError, ConfigError
from tilecut_targets.ascend.target import AscendTarget

X = [{"x": torch.randn(64, 12, generator=torch.Generator().manual_seed(i))} for i in range(12)]
CONFIG = PruneConfig(at={"batch": 4})
MODEL = randomise(TinyMlp(neurons=128))
FILES = {"explore.json", "explore.png", "explore.html"}


def swept(output, **options):
    given = {"calibration": X, "config": CONFIG, "output": output, **options}
    return explore(MODEL, given.pop("target", "edge"), torch.randn(4, 12), **given)


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    steps = []
    output = tmp_path_factory.mktemp("explore") / "front"
    # A sparsity of 0.95 leaves less than one block of 16.
    found = swept(output, sparsities=(0.25, 0.5, 0.75, 0.95), progress=Progress(on_step=lambda *step: steps.append(step)))
    return found, steps


def test_what_is_written(explored):
    found, steps = explored
    assert {p.name for p in found.path.iterdir()} == FILES
    # No temporary sibling is left.
    assert [p.name for p in found.path.parent.iterdir()] == ["front"]
    picture = (found.path / "explore.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    page = (found.path / "explore.html").read_text()
    assert base64.b64encode(picture).decode() in page and "src=" in page
    assert "http" not in page.partition("https://doi")[0]
    assert json.loads((found.path / "explore.json").read_text()) == Exploration(found.path).report == found.report
    assert steps[-1] == (5, 5)


def test_every_budget_is_a_point(explored):
    found, _ = explored
    assert list(found.points) == ["dense", "sparsity-0.25", "sparsity-0.5", "sparsity-0.75", "sparsity-0.95"]
    dense = found.points["dense"]
    assert dense["quality"] == 1 and dense["macs"] == 4 * 128 * (12 + 3) and dense["parameters"] == 12 * 128 + 128 + 128 * 3 + 3
    for sparsity in (0.25, 0.5, 0.75):
        p = found.points[f"sparsity-{sparsity}"]
        assert p["why"] is None and p["budget"] == {"sparsity": sparsity} and p["artifact"] is None
        assert p["macs"] <= (1 - sparsity) * dense["macs"] and p["parameters"] < dense["parameters"]
        assert p["kept"]["up:neurons"] == p["macs"] / (4 * 15)
        assert 0 < p["predicted_ms"] <= dense["predicted_ms"] and p["predicted_ms"] == p["cost"]


def test_a_budget_that_cannot_be_met_is_a_point_with_its_reason(explored):
    found, _ = explored
    lost = found.points["sparsity-0.95"]
    assert "no legal model fits the budget" in lost["why"] and lost["cost"] is None and lost["macs"] is None
    assert "sparsity-0.95" not in found.front
    assert "sparsity-0.95 cannot be met: search: no legal model" in (found.path / "explore.html").read_text()


def test_the_front_is_that_of_the_points(explored):
    found, _ = explored
    reached = [p for p in found.report["points"] if p["why"] is None]
    wanted = find_front([(p["cost"], p["quality"]) for p in reached])
    assert found.front == [reached[i]["name"] for i in wanted]
    assert found.knee is None or found.knee in found.front[1:-1]
    assert found.report["cost"]["name"] == "predicted_ms" and found.report["quality"]["name"] == "cosine"


def test_a_compile_of_a_point_gives_that_point_from_the_same_table(explored, tmp_path):
    found, _ = explored
    p = found.points["sparsity-0.5"]
    artifact = compile_pruned(
        MODEL, "edge", torch.randn(4, 12), X, PruneConfig(sparsity=0.5, at={"batch": 4}), tmp_path / "a", measure=False
    )
    assert artifact.report["table"]["measured"] == 0 and artifact.report["table"]["held"] > 0
    assert {g.name: g.count for g in artifact.plan.groups} == p["kept"]
    assert artifact.report["macs"]["pruned"] == p["macs"]
    assert artifact.report["parameters"]["pruned"] == p["parameters"]
    for key, value in artifact.report["fidelity"]["output"].items():
        assert p["fidelity"]["output"][key] == pytest.approx(value, abs=2e-6)


def test_budgets_in_milliseconds(explored, tmp_path):
    known = explored[0].points
    dense, least = known["dense"]["predicted_ms"], known["sparsity-0.75"]["predicted_ms"]
    budgets = (least / 100, (dense + least) / 2, 2 * dense)
    # The preset's sparsity gives way.
    found = swept(tmp_path / "ms", latencies_ms=budgets, config=CONFIG.model_copy(update={"sparsity": 0.7}))
    lost, middle, all_of_it = list(found.points.values())[1:]
    assert "no legal model fits the budget" in lost["why"] and "milliseconds" in lost["why"]
    assert middle["why"] is None and middle["predicted_ms"] <= budgets[1]
    assert all_of_it["kept"] == found.points["dense"]["kept"]
    # Nothing was measured again.
    assert found.report["table"]["measured"] == 0


def test_artifacts_are_written_and_timed(tmp_path):
    found = swept(tmp_path / "front", sparsities=(0.5,), measure=True)
    assert {p.name for p in found.path.iterdir()} == FILES | {"dense", "sparsity-0.5"}
    for name, p in found.points.items():
        artifact = found.artifact(name)
        assert {r.status for r in artifact.verify()} == {"passed"}
        assert {g.name: g.count for g in artifact.plan.groups} == p["kept"]
        assert artifact.report["fidelity"] == p["fidelity"]
        assert artifact.report["parameters"]["pruned"] == p["parameters"]
        assert p["measured"]["cpu_ms"] == p["cost"]
    assert found.report["cost"]["name"] == "measured_ms" and "measured (CPU time)" in found.report["title"]
    with pytest.raises(ArtifactError, match=r"no artifact of 'x'; wanted dense or sparsity-0.5"):
        found.artifact("x")
    # The folder is ours: it is replaced. What else lies in it is not.
    again = swept(found.path, sparsities=(0.5,))
    assert {p.name for p in again.path.iterdir()} == FILES
    with pytest.raises(ArtifactError, match="explore with emit=True"):
        again.artifact("dense")
    (again.path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds notes\.txt, which explore did not write"):
        swept(again.path, sparsities=(0.5,))
    assert {p.name for p in again.path.iterdir()} == FILES | {"notes.txt"}


@dataclass(frozen=True)
class WithoutCost(AscendTarget):
    """A target that cannot say what a run costs."""

    def cost(self, *given):  # type: ignore[override]
        return None


def test_a_target_without_a_latency_model_is_counted_in_macs(tmp_path):
    config = PruneConfig(method="magnitude")
    found = swept(tmp_path / "front", target=WithoutCost(), config=config, sparsities=(0.0,), measure=True)
    assert found.report["cost"] == {"name": "macs", "label": "MACs", "why": "the ascend target has no latency model"}
    assert "against MACs (the ascend target has no latency model)" in found.report["title"]
    assert found.report["latency"]["status"] == "not run"
    page = (found.path / "explore.html").read_text()
    assert "the ascend target has no latency model" in page and "not measured: " in page
    with pytest.raises(ConfigError, match="the ascend target has no latency model"):
        swept(tmp_path / "ms", target=WithoutCost(), latencies_ms=(1.0,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsities": (0.97, 0.99)}, ConfigError, "none of 2 budgets can be met; got of sparsity-0.97: search: no legal"),
        ({"sparsities": (0.5, 1.5)}, ConfigError, "bad sparsity; got 1.5"),
        ({"sparsities": ()}, ConfigError, "no budget to explore"),
        ({"sparsities": (0.5,), "latencies_ms": (1.0,)}, ConfigError, "sparsities and latencies_ms are given"),
        ({"latencies_ms": (-1.0,)}, ConfigError, "bad max_latency_ms; got -1.0"),
        ({"config": None}, ConfigError, "config=None cuts nothing"),
        ({"quality": "beauty"}, ConfigError, "unknown quality; got 'beauty'"),
        ({"quality": "perplexity", "sparsities": (0.5,)}, ConfigError, "no such quality; got 'perplexity'; wanted cosine"),
        ({"calibration": None}, CalibrationError, "no data to compare the models on"),
    ],
)
@pytest.mark.filterwarnings("ignore:no calibration data")
def test_what_cannot_be_done_is_one_error_and_leaves_nothing(options, error, message, explored, tmp_path):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        swept(tmp_path / "front", **options)
    assert not list(tmp_path.iterdir())
