"""`tilecut::rotary`: complex rotation as the reference, fake kernel, gradients, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilecut_runtime.errors import InputError
from tilecut_runtime.rotary import rotary

BOTH = pytest.mark.parametrize("interleaved", [False, True])


def angles(batch, length, width, interleaved):
    """cos, sin [B, 1, S, D] of random angles, one a pair, and the angles [B, 1, S, D / 2]."""
    turn = torch.randn(batch, 1, length, width // 2, dtype=torch.float64)
    wide = turn.repeat_interleave(2, -1) if interleaved else torch.cat((turn, turn), -1)
    return wide.cos(), wide.sin(), turn


def by_complex_numbers(x, turn, interleaved):
    """Every pair of x as a complex number, multiplied by exp(i angle)."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(turn), turn))
    return turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)


@BOTH
@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 4), length=st.integers(1, 7), half=st.integers(1, 9), shared=st.booleans()
)
def test_pairs_are_turned_by_the_angle(interleaved, batch, heads, length, half, shared):
    torch.manual_seed(length)
    x = torch.randn(batch, heads, length, 2 * half, dtype=torch.float64)
    cos, sin, turn = angles(1 if shared else batch, length, 2 * half, interleaved)
    want = by_complex_numbers(x, turn, interleaved)
    torch.testing.assert_close(rotary(x, cos, sin, interleaved=interleaved), want)
    flat = rotary(*(t.transpose(1, 2) for t in (x, cos, sin)), interleaved=interleaved)
    torch.testing.assert_close(flat.transpose(1, 2), want)


@BOTH
def test_the_ops_own_checks_hold(interleaved):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(1, 1, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.tilecut.rotary.default, (x, cos, sin), {"interleaved": interleaved})
    assert torch.autograd.gradcheck(lambda *given: rotary(*given, interleaved=interleaved), (x, cos, sin))
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos.detach(), sin.detach(), interleaved=interleaved), (x,))


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "why"),
    [
        (ones(2, 5, 8), ones(2, 5, 8), ones(2, 5, 8), "x does not fit"),
        (ones(2, 3, 5, 7), ones(1, 1, 5, 7), ones(1, 1, 5, 7), "D even"),
        (ones(2, 3, 5, 8), ones(1, 1, 4, 8), ones(1, 1, 5, 8), "cos does not fit"),
        (ones(2, 3, 5, 8), ones(1, 1, 5, 8), ones(1, 1, 5, 4), "sin does not fit"),
        (ones(2, 3, 5, 8), ones(1, 1, 5, 8), ones(5, 8), "sin does not fit"),
        (ones(2, 3, 5, 8), ones(1, 1, 5, 8, dtype=torch.float16), ones(1, 1, 5, 8), "one floating dtype"),
        (ones(2, 3, 5, 8).long(), ones(1, 1, 5, 8).long(), ones(1, 1, 5, 8).long(), "one floating dtype"),
    ],
)
def test_operands_that_do_not_fit_are_one_error(x, cos, sin, why):
    with pytest.raises(InputError, match=why):
        rotary(x, cos, sin)
    with pytest.raises(InputError, match=why):
        torch.ops.tilecut.rotary(x, cos, sin, interleaved=False)
