"""Streamed normal equations against least squares on all rows at once, in float64."""

import pytest
import torch

from tilecut_passes import solve_layer
from tilecut_passes.solve_layer import BIAS_PENALTY, NormalEquations, solve


def problem(rows=60, inputs=7, outputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, target, matrix, offset = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, inputs), (rows, outputs), (outputs, inputs), (outputs,))
    )
    # Offsets and scales that differ: what centred and scaled data would hide.
    return x * torch.linspace(0.1, 3, inputs, dtype=torch.float64) + 1, target + 2, matrix, offset


def reference(x, target, matrix, offset, ridge):
    """The minimum, from the rows of all terms stacked up."""
    penalty = ridge * x.square().sum(0).mean()
    rows = [torch.cat([x, x.new_ones(len(x), 1)], 1), torch.eye(x.shape[1] + 1, dtype=x.dtype)]
    rows[1][:-1] *= penalty.sqrt()
    rows[1][-1] *= (BIAS_PENALTY * len(x)) ** 0.5
    start = torch.cat([matrix.T, offset[None]])
    wanted = torch.cat([target, rows[1] @ start])
    design = torch.cat(rows)
    if offset.count_nonzero() == 0:
        design, wanted = design[:-1, :-1], wanted[:-1]
    return torch.linalg.lstsq(design, wanted, driver="gelsd").solution


def solved(x, target, matrix, offset, ridge, pieces=1, ignored=None):
    equations = NormalEquations(x.shape[1], target.shape[1])
    for rows, wanted in zip(x.chunk(pieces), target.chunk(pieces), strict=True):
        equations.add(rows, wanted)
    equations.share()
    if ignored is not None:
        equations.ignore(ignored)
    cross = equations.cross
    matrix, offset = matrix.clone(), None if offset is None else offset.clone()
    solve(equations.factor(ridge, with_bias=offset is not None), matrix, offset, lambda here: cross[:, here])
    return matrix, offset


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(60, 7, 5), (200, 1, 9), (5, 12, 3)])
def test_it_is_the_ridge_solution(rows, inputs, outputs, ridge):
    x, target, matrix, offset = problem(rows, inputs, outputs)
    want = reference(x, target, matrix, offset, ridge)
    got, bias = solved(x, target, matrix, offset, ridge)
    assert torch.allclose(got.T, want[:-1], atol=1e-6)
    assert torch.allclose(bias, want[-1], atol=1e-6)


def test_without_a_bias():
    x, target, matrix, _ = problem()
    want = reference(x, target, matrix, torch.zeros(5, dtype=torch.float64), 1e-2)
    got, bias = solved(x, target, matrix, None, 1e-2)
    assert bias is None and torch.allclose(got.T, want, atol=1e-9)


def test_pieces_give_what_all_rows_at_once_give(monkeypatch):
    given = problem(rows=61)
    whole = solved(*given, 1e-2)
    monkeypatch.setattr(solve_layer, "OUTPUTS_AT_ONCE", 2)
    for one, other in zip(whole, solved(*given, 1e-2, pieces=9), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_float32_rows_are_summed_in_float64():
    """A float32 sum stays at 2^24 when ones are added."""
    equations = NormalEquations(1, 1)
    equations.add(torch.full((1, 1), 4096.0), torch.full((1, 1), 4096.0))
    for _ in range(1000):
        equations.add(torch.ones(1, 1), torch.ones(1, 1))
    equations.share()
    assert float(equations.gram[0, 0]) == float(equations.cross[0, 0]) == 2**24 + 1000
    assert equations.rows == 1001


def test_ignored_inputs_keep_their_weights_and_do_not_move_the_others():
    x, target, matrix, offset = problem()
    matrix[:, 2] = 0
    x[:, 2] = 0.5
    got, bias = solved(x, target, matrix, offset, 1e-2, ignored=torch.tensor([2]))
    others = [0, 1, 3, 4, 5, 6]
    want, wanted_bias = solved(x[:, others], target, matrix[:, others], offset, 1e-2)
    assert got[:, 2].count_nonzero() == 0
    assert torch.allclose(got[:, others], want, atol=1e-12)
    assert torch.allclose(bias, wanted_bias, atol=1e-12)


def test_no_rows_keep_the_start():
    _, _, matrix, _ = problem()
    none = torch.empty(0, 7, dtype=torch.float64), torch.empty(0, 5, dtype=torch.float64)
    got, _ = solved(*none, matrix, None, 1e-2)
    assert torch.allclose(got, matrix, rtol=1e-12, atol=1e-15)


def test_what_cannot_be_factored_is_said():
    equations = NormalEquations(2, 1)
    equations.add(torch.tensor([[1.0, 1.0]]), torch.ones(1, 1))
    equations.share()
    equations.gram[0, 1] = equations.gram[1, 0] = 2.0
    with pytest.raises(ArithmeticError, match="singular"):
        equations.factor(1e-9, with_bias=False)
