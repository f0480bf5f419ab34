import statistics

import pytest

from tilecut.mix_texts import general_passages, general_texts, mixed_in


def test_a_fixed_part_is_held_out():
    fit, held = general_passages()
    assert len(held) == 128 and len(fit) == 896
    assert not set(fit) & set(held)


def test_texts_come_from_the_passages_to_fit_with_alone():
    whole = " ".join(general_passages()[0])
    held = " ".join(general_passages()[1])
    for text in general_texts(300, 8, seed=3):
        gloss = text.rstrip(".")
        assert gloss in whole and gloss not in held


@pytest.mark.parametrize("words", [3, 20, 40, 80])
def test_texts_are_as_long_as_the_callers(words):
    texts = general_texts(400, words, seed=0)
    mean = statistics.mean(len(text.split()) for text in texts)
    # One gloss is the least.
    assert mean == pytest.approx(max(words, 14), rel=0.25)
    assert all(text.endswith(".") and not text.endswith("..") for text in texts)


def test_as_many_as_asked_for_or_all_there_are():
    assert len(general_texts(1365, 8, seed=0)) == 1365
    everything = general_texts(10**6, 8, seed=0)
    assert 2000 < len(everything) == len(set(everything))
    assert general_texts(0, 8, seed=0) == []
    assert general_texts(9, 8, seed=0) == everything[:9] != general_texts(9, 8, seed=1)


@pytest.mark.parametrize(
    ("count", "mixture", "wanted"), [(3072, 0.25, 1024), (100, 0.5, 100), (100, 0, 0), (1, 0.25, 0)]
)
def test_the_fraction_is_of_all_texts(count, mixture, wanted):
    assert mixed_in(count, mixture) == wanted
