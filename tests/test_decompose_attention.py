"""Attention as MatMul and Softmax against the op's meaning, on rows that see a key; the others stay finite."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilecut_runtime.attention import attention_naive
from tilecut_runtime.errors import LoweringError
from tilecut_targets.decompose_attention import decomposed_attention, finite

DEFAULTS = {
    "scale": 0.3,
    "causal": "none",
    "window": [-1, -1],
    "global_tokens": 0,
    "softcap": 0.0,
    "dropout_p": 0.0,
}


def operands(b=2, hq=4, hk=2, sq=5, sk=7, d=8, e=6, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return make(b, hq, sq, d), make(b, hk, sk, d), make(b, hk, sk, e)


def visible(q, k, key_padding, bias, options):
    """Which query sees a key at all, bool [B, Hq, Sq]: what attention over ones is not zero."""
    ones = torch.ones(*k.shape[:3], 1, dtype=q.dtype)
    hidden = None if bias is None else torch.where(bias.isinf(), bias, 0.0)
    return attention_naive(q, k, ones, key_padding, hidden, None, **options)[..., 0] > 0.5


def assert_same_meaning(q, k, v, key_padding=None, bias=None, slopes=None, tolerance=1e-12, **changes):
    options = {**DEFAULTS, **changes}
    want = attention_naive(q, k, v, key_padding, bias, slopes, **options)
    got = decomposed_attention(q, k, v, key_padding, bias, slopes, **options)
    rows = visible(q, k, key_padding, bias, options)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert got.isfinite().all()
    assert torch.allclose(got[rows], want[rows], atol=tolerance, rtol=0)
    return rows


def test_it_takes_what_the_op_takes():
    names = lambda function: list(inspect.signature(function).parameters)
    assert names(decomposed_attention) == names(attention_naive)
    schema = torch.ops.tilecut.attention.default._schema
    assert names(decomposed_attention) == [a.name for a in schema.arguments]


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("window", [[-1, -1], [2, 1], [0, -1], [-1, 0]])
@pytest.mark.parametrize("global_tokens", [0, 2])
@pytest.mark.parametrize(("sq", "sk"), [(5, 7), (7, 5), (6, 6), (1, 6)])
def test_causal_windows_and_global_tokens(causal, window, global_tokens, sq, sk):
    rows = assert_same_meaning(*operands(sq=sq, sk=sk), causal=causal, window=window, global_tokens=global_tokens)
    assert rows.any()


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("shape", [None, (1, 1, 5, 7), (2, 4, 5, 7), (2, 1, 1, 7)])
def test_softcap_alibi_and_bias(softcap, alibi, shape):
    bias = None if shape is None else torch.randn(*shape, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64) if alibi else None
    assert assert_same_meaning(*operands(), None, bias, slopes, softcap=softcap, causal="bottom_right").all()


@pytest.mark.parametrize(("hq", "hk"), [(1, 1), (4, 4), (4, 1), (6, 3)])
def test_grouped_queries_read_their_own_keys(hq, hk):
    assert assert_same_meaning(*operands(hq=hq, hk=hk)).all()


def test_padding_hides_keys():
    padding = torch.tensor([[True] * 7, [False, True, True, False, True, False, False]])
    assert assert_same_meaning(*operands(), padding).all()


@settings(max_examples=200)
@given(
    sq=st.integers(1, 6), sk=st.integers(1, 6), groups=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    causal=st.sampled_from(["none", "top_left", "bottom_right"]), left=st.integers(-1, 3), right=st.integers(-1, 3),
    global_tokens=st.integers(0, 2), softcap=st.sampled_from([0.0, 2.0]), padded=st.booleans(),
    biased=st.sampled_from(["no", "some", "-inf"]), alibi=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_any_combination(sq, sk, groups, causal, left, right, global_tokens, softcap, padded, biased, alibi, seed):
    hq, hk = groups
    q, k, v = operands(2, hq, hk, sq, sk, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(2, sk, generator=generator) > 0.4 if padded else None
    bias = torch.randn(1, hq, sq, sk, generator=generator, dtype=torch.float64) if biased != "no" else None
    if bias is not None and biased == "-inf":
        bias = bias.masked_fill(torch.rand(1, hq, sq, sk, generator=generator) > 0.5, -torch.inf)
    slopes = torch.rand(hq, generator=generator, dtype=torch.float64) if alibi else None
    assert_same_meaning(
        q, k, v, padding, bias, slopes, causal=causal, window=[left, right], global_tokens=global_tokens, softcap=softcap
    )  # fmt: skip


def hidden_rows(dtype):
    """Padding that hides all of batch 1, and a bias that hides key 5 from query 2 on and all keys from query 3."""
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[1] = False
    bias = torch.zeros(1, 1, 5, 7, dtype=dtype)
    bias[..., 3, :] = -torch.inf
    bias[..., 2:, 5] = -torch.inf
    return padding, bias


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_every_dtype_stays_finite_where_no_key_is_seen(dtype, tolerance):
    rows = assert_same_meaning(*operands(dtype=dtype), *hidden_rows(dtype), tolerance=tolerance)
    assert rows.tolist() == [[[True, True, True, False, True]] * 4, [[False] * 5] * 4]


def test_a_mask_does_not_overflow_in_half_precision_when_a_score_is_added():
    q, k, v = operands(dtype=torch.float16)
    # Scores about -24: the least half number and that together are -inf.
    q, k = 3 + q / 10, -3 + k / 10
    assert_same_meaning(q, k, v, *hidden_rows(torch.float16), scale=1 / 3, tolerance=5e-2)


def test_a_bias_is_made_finite_and_otherwise_kept():
    bias = torch.tensor([0.0, -3.0, 100.0, -torch.inf])
    assert finite(bias).tolist() == [0.0, -3.0, 100.0, torch.finfo(torch.float32).min / 2]


def test_dropout_is_refused():
    with pytest.raises(LoweringError, match=r"dropout is for training; got 0\.1; wanted 0\.0; call model\.eval\(\) first"):
        decomposed_attention(*operands(), None, None, None, **{**DEFAULTS, "dropout_p": 0.1})
