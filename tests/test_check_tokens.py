import warnings

import pytest
import torch

from tilecut.check_tokens import TOKENS_PER_INPUT, check_tokens
from tilecut.load_calibration import Calibration
from tilecut_passes.calibration import Batch


def calibration(tokens: int) -> Calibration:
    batch = Batch({"x": torch.ones(tokens, 3)})
    return Calibration([batch], [batch], "some rows")


def test_the_widest_layer_and_what_is_wanted_are_named():
    with pytest.warns(UserWarning, match="few calibration data") as caught:
        (note,) = check_tokens(calibration(100), {"a.weight": 8, "b.weight": 48, "c.weight": 16})
    assert [str(w.message) for w in caught] == [note]
    assert note == (
        "few calibration data: 100 tokens or rows to refit b.weight with, which keeps 48 inputs; "
        f"at least {48 * TOKENS_PER_INPUT} are wanted: give more texts or batches"
    )


def test_enough_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_tokens(calibration(48 * TOKENS_PER_INPUT), {"b.weight": 48, "a.weight": 8}) == []
        assert check_tokens(calibration(1), {}) == []
