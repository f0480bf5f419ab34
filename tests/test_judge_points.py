import math

import pytest

from tilecut.judge_points import QUALITIES, Point, choose_cost, choose_quality, judge
from tilecut_runtime.errors import ConfigError

HIDDEN = {"hidden": {"cosine": 0.9, "relative_error": 0.4}, "pooled": {"cosine": 0.7, "relative_error": 0.6}}
LABELLED = {"pruned_loss": 0.5, "pruned_accuracy": 0.8, "dense_loss": 0.4, "dense_accuracy": 0.9}
LOGITS = {"logits": {"cosine": 0.8, "relative_error": 0.5}}


@pytest.mark.parametrize(
    ("fidelity", "wanted"),
    [
        (HIDDEN, "cosine"),
        ({**HIDDEN, "general": {**HIDDEN, "task": {"pruned_perplexity": 3.0}}}, "cosine"),
        ({**LOGITS, "task": {**LABELLED, "kl": 0.1}}, "accuracy"),
        # Labels are compared with an output that holds no classes.
        ({**HIDDEN, "task": LABELLED}, "cosine"),
        ({**LOGITS, "task": {**LABELLED, "pruned_perplexity": 30.0}}, "perplexity"),
        ({**LOGITS, "task": {"pruned_loss": 0.5}}, "cosine"),
    ],
)
def test_the_quality_is_what_model_and_data_have(fidelity, wanted):
    assert choose_quality(None, fidelity) == wanted


def test_a_quality_that_is_asked_for_must_be_there():
    labelled = {**LOGITS, "task": {**LABELLED, "kl": 0.1}}
    for name in ("cosine", "accuracy", "loss", "kl"):
        assert choose_quality(name, labelled) == name
    with pytest.raises(ConfigError, match=r"no such quality; got 'perplexity'; wanted cosine or accuracy or loss or kl"):
        choose_quality("perplexity", labelled)


def test_qualities_read_the_held_out_figures_of_all_outputs():
    held = {**HIDDEN, "task": LABELLED, "general": {"hidden": {"cosine": 0.1}}}
    assert QUALITIES["cosine"].read(held) == pytest.approx(0.8)
    assert QUALITIES["accuracy"].read(held) == 0.8
    for one in QUALITIES.values():
        assert (one.score(0.6) > one.score(0.5)) == (one.better == "higher")


def point(name, macs, perplexity, predicted=None, measured=None, why=None):
    times = {"cpu_ms": measured, "wall_ms": -measured} if measured is not None else None
    return Point(
        name, {}, why, macs, 10, predicted_ms=predicted, measured=times, fidelity={"task": {"pruned_perplexity": perplexity}}
    )


def test_milliseconds_come_before_macs_and_measured_before_predicted():
    lost = point("lost", 1, 1.0, why="too small")
    counted, predicted, measured = point("a", 5, 2.0), point("b", 5, 2.0, 1.5), point("c", 5, 2.0, 1.5, 1.7)
    assert choose_cost([lost, measured], 1, "edge")["name"] == "measured_ms"
    assert "CPU time" in choose_cost([measured], 1, "edge")["label"]
    assert "wall time" in choose_cost([measured], 4, "edge")["label"]
    assert choose_cost([predicted, measured], 1, "edge")["name"] == "predicted_ms"
    assert choose_cost([predicted], 1, "cuda", calculated=True)["label"] == "milliseconds, calculated"
    assert choose_cost([predicted, counted], 1, "cuda") == {
        "name": "macs",
        "label": "MACs",
        "why": "the cuda target has no latency model",
    }


def test_points_are_judged_by_the_logarithm_of_perplexity():
    # Entropies of 8, 3, 1.5 and 1 bend at the second; the perplexities themselves bend there too much to tell.
    points = [
        point("dense", 40, math.exp(1.0)),
        point("half", 30, math.exp(1.5)),
        point("third", 20, math.exp(3.0)),
        point("worse", 25, math.exp(3.5)),
        point("tenth", 10, math.exp(8.0)),
        point("none", None, None, why="too small"),
    ]
    front, knee = judge(points, "macs", "perplexity", 1)
    assert front == ["tenth", "third", "half", "dense"] and knee == "third"
    assert points[0].cost == 40 and points[0].quality == math.exp(1.0)
    assert points[-1].cost is None and points[-1].quality is None


def test_the_clock_is_that_of_the_threads():
    points = [point("a", 1, 2.0, measured=4.0), point("b", 1, 2.0, measured=3.0)]
    assert judge(points, "measured_ms", "perplexity", 1)[0] == ["b"]
    assert judge(points, "measured_ms", "perplexity", 2)[0] == ["a"]
