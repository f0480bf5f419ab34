"""Rearrangement against brute force, and what it never does."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import bert_graph, groups_of, text_batch
from tilecut_passes.calibration import check_batches
from tilecut_passes.rearrange_masks import rearrange, rearrange_masks, removal_loss
from tilecut_passes.score_gates import fisher_matrices


def gradients(size, batches, seed):
    """A Fisher matrix of fewer batches than units, as calibration gives it, with strong interactions."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(batches, size, generator=generator, dtype=torch.float64) + torch.randn(
        batches, 1, generator=generator
    )
    return g.T @ g / batches


def most_important(fisher, count):
    return sorted(fisher.diagonal().argsort(descending=True)[:count].tolist())


@settings(max_examples=60)
@given(st.integers(2, 9), st.data())
def test_no_swap_of_two_units_improves_it(size, data):
    count = data.draw(st.integers(1, size))
    fisher = gradients(size, data.draw(st.integers(1, 12)), data.draw(st.integers(0, 10**6)))
    start = most_important(fisher, count)
    found = rearrange(start, fisher, swaps=10**4)
    loss = removal_loss(found, fisher)
    assert len(found) == len(set(found)) == count and list(found) == sorted(found)
    assert loss <= removal_loss(start, fisher) + 1e-9
    out = [u for u in range(size) if u not in found]
    swapped = [removal_loss([*(u for u in found if u != k), r], fisher) for k in found for r in out]
    assert all(loss <= other + 1e-9 for other in swapped)


@pytest.mark.parametrize("seed", range(8))
def test_it_comes_close_to_the_best_of_all_sets(seed):
    """Over all sets of 5 of 9: never far from the optimum in what the diagonal alone leaves on the table."""
    fisher = gradients(9, 20, seed)
    start = most_important(fisher, 5)
    best = min(removal_loss(kept, fisher) for kept in itertools.combinations(range(9), 5))
    before, after = removal_loss(start, fisher), removal_loss(rearrange(start, fisher), fisher)
    assert best - 1e-9 <= after <= best + 0.5 * (before - best) + 1e-9


def test_units_that_cancel_are_removed_together():
    """Units 0 and 1 undo each other: the diagonal keeps the larger one, removed together they cost next to nothing."""
    g = torch.tensor([[5.1, -4.9, 5.5, 1.0]], dtype=torch.float64)
    fisher = g.T @ g
    assert most_important(fisher, 2) == [0, 2]
    assert rearrange([0, 2], fisher) == (2, 3)


def test_a_diagonal_matrix_changes_nothing():
    fisher = torch.diag(torch.rand(30, generator=torch.Generator().manual_seed(0)))
    start = most_important(fisher, 12)
    assert rearrange(start, fisher) == tuple(start)


def test_a_worse_start_is_repaired_and_the_number_of_swaps_is_bounded():
    fisher = torch.diag(torch.arange(10.0))
    assert rearrange(range(4), fisher) == (6, 7, 8, 9)
    assert rearrange(range(4), fisher, swaps=1) == (1, 2, 3, 9)
    assert rearrange(range(4), fisher, swaps=0) == (0, 1, 2, 3)


def test_whole_groups_and_groups_without_a_matrix_stay():
    fisher = {"a": gradients(6, 3, 0), "b": gradients(4, 3, 0)}
    found = rearrange_masks({"a": range(6), "b": [0, 3], "c": [1, 2]}, fisher)
    assert (found["a"], found["c"]) == (tuple(range(6)), (1, 2))
    assert found["b"] == rearrange([0, 3], fisher["b"])


def test_real_gradients_lose_less_after_it():
    graph = bert_graph()
    groups = groups_of(graph)
    batches = check_batches(graph, [text_batch(4, 12, seed=i) for i in range(10)])
    fisher = fisher_matrices(graph, groups, batches, 0, lambda done, of: None)
    start = {g.name: most_important(fisher[g.name], g.size // 2) for g in groups}
    found = rearrange_masks(start, fisher)
    before = sum(removal_loss(start[g.name], fisher[g.name]) for g in groups)
    after = sum(removal_loss(found[g.name], fisher[g.name]) for g in groups)
    assert {n: len(u) for n, u in found.items()} == {n: len(u) for n, u in start.items()}
    assert after < 0.9 * before
