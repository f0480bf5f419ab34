import pytest

from tilecut.mix_texts import general_passages, mixed_in

ROWS = [[i] * (1 + i % 7) for i in range(300)]
TOKENS = sum(map(len, ROWS))


def test_a_fixed_part_is_held_out():
    fit, held = general_passages()
    assert len(held) == 128 and len(fit) == 1920
    assert not set(fit) & set(held)
    # A line that is cut short would be one of no sentence.
    assert all(line.endswith((".", '"')) and ": " in line for line in (*fit, *held))


def test_no_gloss_stands_on_both_sides():
    fit, held = general_passages()
    whole = "\n".join(fit)
    for passage in held:
        for gloss in passage.split(". "):
            assert len(gloss) < 60 or gloss not in whole


@pytest.mark.parametrize("mixture", [0.1, 0.25, 0.5, 0.8])
def test_the_fraction_is_of_all_tokens(mixture):
    for own in (50, 200):
        rows = mixed_in(ROWS, len, own, mixture, seed=0)
        tokens = sum(map(len, rows))
        assert tokens == pytest.approx(own * mixture / (1 - mixture), abs=4)
        assert len({row[0] for row in rows}) == len(rows)


def test_as_many_as_there_are_and_none_for_nothing():
    assert sorted(mixed_in(ROWS, len, 10 * TOKENS, 0.5, seed=0)) == sorted(ROWS)
    assert mixed_in(ROWS, len, TOKENS, 0, seed=0) == []
    assert mixed_in([], len, TOKENS, 0.5, seed=0) == []


def test_the_choice_follows_the_seed():
    first, same, other = (mixed_in(ROWS, len, 100, 0.5, seed) for seed in (0, 0, 1))
    assert first == same != other
