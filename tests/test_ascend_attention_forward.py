"""The Ascend attention kernel in Triton's interpreter, against float64: no private environment is needed for it.

The interpreter is chosen when triton is imported, so the cases run in a process of their own: without TRITON_INTERPRET
this file holds one test that starts pytest on it again. PyPI's Triton knows powers of two alone; the other widths run
in `test_ascend_run_kernel.py`.
"""

import os
from itertools import product

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Queries, keys.
LENGTHS = {"short": (21, 75), "long": (75, 33), "one": (1, 40)}
WINDOWS = {"none": (-1, -1), "left": (17, -1), "right": (-1, 9), "both": (20, 6)}

if not INTERPRETED:
    from checks import run_interpreted

    def test_interpreted(pytestconfig):
        run_interpreted(pytestconfig, __file__)

else:
    from tilecut_runtime.attention import attention_naive
    from tilecut_targets.ascend.kernels.attention_forward import attention_forward

    def largest_error(nq, nk, causal, window, padded, width=32, value=16, tail=True, tile=(16, 32)) -> float:
        q, k, v = torch.randn(2, 2, nq, width), torch.randn(2, 1, nk, width), torch.randn(2, 1, nk, value)
        q, k, v = q.half(), k.half(), v.half()
        out = torch.full((2, 2, nq, value), torch.nan, dtype=torch.half)
        padding = torch.rand(2, nk) > 0.3
        padding[1] = False
        attention_forward[(3,)](
            *(q, k, v, padding.to(torch.int8) if padded else None, out, 0.2, 2, 2, 1, nq, nk),
            *(width, value, causal != "none", causal == "top_left", *window, tail, *tile),
        )
        options = {"causal": causal, "window": window, "global_tokens": 0, "softcap": 0.0, "dropout_p": 0.0}
        mask = padding if padded else None
        want = attention_naive(q.double(), k.double(), v.double(), mask, None, None, scale=0.2, **options)
        return float((out.double() - want).abs().max().nan_to_num(torch.inf))

    # Every mask at every length, every other one with padding.
    CASES = [
        (*case, bool(i % 2)) for i, case in enumerate(product(WINDOWS, LENGTHS, ("none", "top_left", "bottom_right")))
    ]

    @pytest.mark.parametrize(("window", "lengths", "causal", "padded"), CASES)
    def test_forward(window, lengths, causal, padded):
        assert largest_error(*LENGTHS[lengths], causal, WINDOWS[window], padded) < 2e-3

    @pytest.mark.parametrize("causal", ["none", "bottom_right"])
    def test_without_a_tail(causal):
        assert largest_error(32, 64, causal, (-1, -1), False, tail=False) < 2e-3
