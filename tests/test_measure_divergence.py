import math

import pytest
import torch

from tilecut_passes.calibration import Batch
from tilecut_passes.measure_divergence import measure_divergence

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def batch(labels=None):
    return Batch({"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": MASK}, labels)


def test_other_outputs_are_half_the_relative_squared_distance_without_padding():
    want, got = {"hidden": torch.randn(2, 3, 4)}, {"hidden": torch.randn(2, 3, 4)}
    x, y = (t["hidden"][MASK != 0].double() for t in (want, got))
    expected = float((x - y).square().sum() / x.square().sum()) / 2
    assert measure_divergence(want, got, batch()) == pytest.approx(expected, rel=1e-5)
    got["hidden"][0, 2] += 100.0
    assert measure_divergence(want, got, batch()) == pytest.approx(expected, rel=1e-5)


def test_logits_are_compared_as_distributions():
    want, got = {"logits": torch.randn(2, 3, 5)}, {"logits": torch.randn(2, 3, 5)}
    p, q = (t["logits"][MASK != 0].double().softmax(-1) for t in (want, got))
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert measure_divergence(want, got, batch()) == pytest.approx(expected, rel=1e-5)
    # A shift of all logits is no change of the distribution.
    assert abs(measure_divergence(want, {"logits": want["logits"] + 3}, batch())) < 1e-5


def test_labels_make_it_the_tasks_own_loss():
    labels = torch.tensor([[1, 0, -100], [2, -100, -100]])
    want, got = {"logits": torch.randn(2, 3, 5)}, {"logits": torch.randn(2, 3, 5)}
    nll = lambda t: -t["logits"].double().log_softmax(-1)[[0, 0, 1], [0, 1, 0], [1, 0, 2]].mean()
    assert measure_divergence(want, got, batch(labels)) == pytest.approx(float(nll(got) - nll(want)), abs=1e-5)


def test_outputs_add_up_and_integers_do_not_count():
    want = {"a": torch.ones(2, 3, 4), "b": torch.ones(2, 3, 2), "ids": torch.ones(2, 3, dtype=torch.long)}
    got = {"a": 2 * torch.ones(2, 3, 4), "b": torch.ones(2, 3, 2), "ids": torch.zeros(2, 3, dtype=torch.long)}
    assert math.isclose(measure_divergence(want, got, batch()), 0.5, rel_tol=1e-6)
