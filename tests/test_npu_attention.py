"""torch_npu's fused attention without torch_npu: its schema, its sparse modes against the reference, and what it refuses."""

import pytest
import torch

from tilecut_runtime.attention import attention_naive
from tilecut_runtime.errors import InputError
from tilecut_runtime.npu_attention import ALL_TOKENS, OP, SCHEMA, TRIANGLE

# An output of fp16, of magnitudes up to 4.
LIMIT = 2e-3
COMPRESSED = torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool).triu(1)


def operands(heads=4, kv_heads=2, sq=5, sk=7):
    generator = torch.Generator().manual_seed(sq + sk)
    return [torch.randn(2, h, s, 16, generator=generator).half() for h, s in ((heads, sq), (kv_heads, sk), (kv_heads, sk))]


def meaning(q, k, v, padding=None, causal="none", window=(-1, -1)):
    q, k, v = (x.double() for x in (q, k, v))
    return attention_naive(
        q, k, v, padding, None, None, scale=0.3, causal=causal, window=window, global_tokens=0, softcap=0.0, dropout_p=0.0
    )  # fmt: skip


def run(q, k, v, layout="BNSD", **options):
    q, k, v = (x.transpose(1, 2) if layout == "BSND" else x for x in (q, k, v))
    heads = {"num_heads": 4, "num_key_value_heads": k.shape[1 if layout == "BNSD" else 2]}
    out, _ = OP(q, k, v, **heads, scale=0.3, input_layout=layout, **options)
    return out.transpose(1, 2) if layout == "BSND" else out


def test_the_schema_is_the_ops():
    assert str(OP._schema) == f"npu::{SCHEMA}"


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("sq", "sk"), [(6, 6), (3, 8), (1, 9)])
@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({}, {}),
        ({"sparse_mode": 2, "atten_mask": COMPRESSED}, {"causal": "top_left"}),
        ({"sparse_mode": 3, "atten_mask": COMPRESSED, "next_tokens": 0}, {"causal": "bottom_right"}),
        ({"sparse_mode": 4, "atten_mask": COMPRESSED, "pre_tokens": 2, "next_tokens": 1}, {"window": (2, 1)}),
        ({"sparse_mode": 4, "atten_mask": COMPRESSED, "pre_tokens": 1, "next_tokens": ALL_TOKENS}, {"window": (1, -1)}),
    ],
)
def test_every_sparse_mode_means_what_the_reference_says(layout, kv_heads, sq, sk, options, rules):
    q, k, v = operands(4, kv_heads, sq, sk)
    torch.testing.assert_close(run(q, k, v, layout, **options).double(), meaning(q, k, v, **rules), atol=LIMIT, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_true_in_a_whole_mask_drops(side):
    q, k, v = operands(sq=7)
    place = torch.arange(7)
    kept = place >= 3 if side == "left" else place < 4
    padding = torch.stack([torch.ones(7, dtype=torch.bool), kept])
    mask = ~padding[:, None, None, :].expand(2, 1, 7, 7)
    torch.testing.assert_close(run(q, k, v, atten_mask=mask).double(), meaning(q, k, v, padding), atol=LIMIT, rtol=0)
    banded = run(q, k, v, atten_mask=mask, next_tokens=0, inner_precise=2).double()
    torch.testing.assert_close(banded, meaning(q, k, v, padding, "bottom_right"), atol=LIMIT, rtol=0)


def test_a_query_that_sees_no_key_gives_zero():
    q, k, v = operands(sq=7)
    assert not run(q, k, v, atten_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_layout": "TND"}, "unknown input_layout; got TND"),
        ({"sparse_mode": 3}, "unknown mode or mask; got mode 3 with a mask None"),
        ({"sparse_mode": 3, "atten_mask": ~COMPRESSED}, "unknown mode or mask"),
        ({"sparse_mode": 7, "atten_mask": COMPRESSED}, "unknown mode or mask; got mode 7"),
        ({"atten_mask": COMPRESSED}, "mode 0 takes a whole mask"),
        ({"pre_tokens": 3}, "mode 0 with limited tokens"),
        ({"num_heads": 8}, "heads do not fit"),
        ({"pse_shift": torch.zeros(1)}, "does not know; got pse_shift"),
        ({"block_size": 128}, "does not know; got block_size"),
    ],
)
def test_what_no_program_of_ours_says_is_refused(options, message):
    given = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.3, "input_layout": "BNSD", **options}
    with pytest.raises(InputError, match=message):
        OP(*operands(), **given)
