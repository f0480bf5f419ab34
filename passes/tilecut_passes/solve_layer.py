"""Normal equations of a layer, streamed over calibration rows, and their ridge solution.

    min_W,b  || X W^T + b - T ||^2 + lambda || W - W0 ||^2 ,     lambda = ridge x mean diagonal of X^T X

Kept are X^T X [I + 1, I + 1] and X^T Y [I + 1, M] in float64, with a last column of ones in X for the bias: memory does
not depend on the number of rows. A thousand rows at a time are multiplied in float32; sums are in float64. The bias is not
penalised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilecut_passes.share_batches import total

# Outputs that are solved for at once: what is held beside the equations does not grow with the layer's outputs.
OUTPUTS_AT_ONCE = 512
ROWS_AT_ONCE = 1024
# Nothing to divide by where every input is zero.
LEAST_PENALTY = 1e-12
BIAS_PENALTY = 1e-9


class NormalEquations:
    """X^T X and X^T Y of one matrix with `inputs` inputs; Y has `columns` columns."""

    def __init__(self, inputs: int, columns: int):
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.cross = torch.zeros(inputs + 1, columns, dtype=torch.float64)
        self.ignored = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x [N, I] and y [N, M]."""
        # A float64 model stays one.
        dtype = torch.promote_types(x.dtype, torch.float32)
        for seen, wanted in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
            seen, wanted = seen.to(dtype), wanted.to(dtype)
            self.gram[:-1, :-1] += (seen.T @ seen).cpu()
            self.gram[-1, :-1] += seen.sum(0, dtype=torch.float64).cpu()
            self.cross[:-1] += (seen.T @ wanted).cpu()
            self.cross[-1] += wanted.sum(0, dtype=torch.float64).cpu()
        self.gram[-1, -1] += len(x)

    def share(self) -> None:
        """Sum over the processes of a data-parallel calibration; then no more rows may be added."""
        total(self.gram)
        total(self.cross)
        self.gram[:-1, -1] = self.gram[-1, :-1]

    @property
    def rows(self) -> int:
        """How many rows were added."""
        return int(self.gram[-1, -1])

    def is_finite(self) -> bool:
        """Whether every row was."""
        return bool(self.gram.isfinite().all() and self.cross.isfinite().all())

    def ignore(self, inputs: Tensor) -> None:
        """Take the inputs at these indices for zero: their weights stay."""
        self.gram[inputs] = 0
        self.gram[:, inputs] = 0
        self.cross[inputs] = 0
        self.ignored = len(inputs)

    def factor(self, ridge: float, with_bias: bool) -> RidgeFactor:
        """Factor X^T X + lambda I. The equations are used up: `gram` holds the sum from now on."""
        mean = float(self.gram.diagonal()[:-1].sum()) / max(1, len(self.gram) - 1 - self.ignored)
        return RidgeFactor(self.gram, ridge * mean, with_bias)


class RidgeFactor:
    """The Cholesky factor of (X^T X + D), D the penalties; without a bias, of the inputs alone.

    Raises:
        ArithmeticError: the matrix is singular in float64.
    """

    def __init__(self, gram: Tensor, penalty: float, with_bias: bool):
        self.size = len(gram) if with_bias else len(gram) - 1
        diagonal = gram.diagonal()
        self.penalty = torch.zeros(len(gram), dtype=gram.dtype)
        self.penalty[:-1] = max(penalty, LEAST_PENALTY)
        self.penalty[-1] = BIAS_PENALTY * diagonal[-1] if with_bias else 0.0
        diagonal += self.penalty
        self.gram = gram
        self.lower, failed = torch.linalg.cholesky_ex(gram[: self.size, : self.size])
        if int(failed):
            raise ArithmeticError("the normal equations are singular")

    def improve(self, start: Tensor, cross: Tensor) -> Tensor:
        """The solution for `start` [I + 1, O], in place, given X^T T; rows are inputs, the last one is the bias."""
        # gram holds X^T X + D.
        missing = torch.addmm(cross, self.gram, start, alpha=-1).addcmul_(self.penalty[:, None], start)
        start[: self.size] += torch.cholesky_solve(missing[: self.size], self.lower)
        return start


def solve(
    factor: RidgeFactor, matrix: Tensor, offset: Tensor | None, cross_of: Callable[[slice], Tensor]
) -> None:
    """Refit a matrix [O, I] and an offset [O] (None: it has none) in place, a block of outputs at a time.

    Args:
        matrix: W0; W afterwards.
        cross_of: X^T T [I + 1, outputs] in float64 for a slice of the outputs.
    """
    for low in range(0, len(matrix), OUTPUTS_AT_ONCE):
        here = slice(low, low + OUTPUTS_AT_ONCE)
        block = matrix[here]
        last = block.new_zeros(len(block)) if offset is None else offset[here]
        start = torch.cat([block.double(), last.double()[:, None]], 1).T.cpu()
        solved = factor.improve(start, cross_of(here)).T.to(matrix.device, matrix.dtype)
        block.copy_(solved[:, :-1])
        if offset is not None:
            last.copy_(solved[:, -1])
