"""Choosing tokens: what is left to draw from, frequencies, penalties, ties, extremes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tilecut_runtime.sample_tokens import Sampling

NONE = np.zeros(0, np.int64)


def drawn(sampling, logits, held=NONE, times=400):
    draw = np.random.default_rng(0)
    return [sampling.choose(logits, held, draw) for _ in range(times)]


def test_temperature_0_takes_the_first_of_the_most_likely():
    assert Sampling().choose(np.array([1.0, 3.0, 3.0], np.float32), NONE, np.random.default_rng(0)) == 1


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3, 50]),
    top_p=st.sampled_from([None, 0.1, 0.6, 0.9, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_only_what_transformers_leaves_is_drawn(seed, temperature, top_k, top_p, penalty):
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal(20).astype(np.float32) * 2
    held = generator.integers(0, 20, 6)
    steps = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p and top_p < 1 else []
    left = (
        LogitsProcessorList(steps)(torch.tensor(held)[None], torch.tensor(logits)[None].double())[0].softmax(-1).numpy()
    )
    found = drawn(Sampling(temperature, top_k, top_p, penalty), logits, held)
    assert {int(i) for i in found} <= set(np.flatnonzero(left > 0))
    shares = np.bincount(found, minlength=20) / len(found)
    # 400 draws: five standard deviations.
    assert np.abs(shares - left).max() < 5 * 0.5 / 400**0.5


def test_the_callers_logits_are_left_alone():
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    kept = logits.copy()
    Sampling(1.0, 2, 0.5, 1.5).choose(logits, np.array([2]), np.random.default_rng(0))
    assert np.array_equal(logits, kept)


@pytest.mark.parametrize("top_k", [None, 2])
def test_banned_tokens_are_never_drawn(top_k):
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0], np.float32)
    assert set(drawn(Sampling(5.0, top_k), logits)) == {1, 3}


def test_rows_have_draws_of_their_own_that_a_seed_repeats():
    one, two = ([d.random() for d in Sampling(1.0, seed=3).draws(n)] for n in (3, 2))
    assert one[:2] == two and len(set(one)) == 3
    assert [d.random() for d in Sampling(1.0).draws(2)] != [d.random() for d in Sampling(1.0).draws(2)]
