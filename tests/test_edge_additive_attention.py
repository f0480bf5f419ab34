"""Masks that are added hide what masks that are chosen hide."""

import pytest
import torch

from tilecut_runtime.attention import attention
from tilecut_runtime.errors import LoweringError
from tilecut_targets.edge.additive_attention import additive_attention

PLAIN = {
    "scale": 0.4, "causal": "none", "window": [-1, -1], "global_tokens": 0, "softcap": 0.0, "dropout_p": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"causal": "top_left"},
        {"causal": "bottom_right", "window": [2, 0]},
        {"window": [1, 2], "global_tokens": 1},
        {"softcap": 3.0, "causal": "top_left"},
    ],
)
def test_it_equals_the_naive_twin(rule, heads, padded):
    q, k, v = torch.randn(3, 4, 9, 8), torch.randn(3, heads, 9, 8), torch.randn(3, heads, 9, 5)
    keep = torch.arange(9)[None] < torch.tensor([9, 4, 1])[:, None] if padded else None
    slopes, bias = torch.rand(4), torch.randn(1, 4, 9, 9)
    for extra in ((None, None), (bias, None), (None, slopes)):
        want = attention(q, k, v, keep, *extra, **{**PLAIN, **rule})
        got = additive_attention(q, k, v, keep, *extra, **{**PLAIN, **rule})
        # A query that sees no key has no agreed value.
        seen = want.abs().sum(-1) > 0
        assert seen.any() and got.isfinite().all()
        assert torch.allclose(got[seen], want[seen], atol=1e-5)


def test_it_holds_no_comparison_of_inputs():
    q = torch.randn(2, 4, 6, 8)
    keep = torch.ones(2, 6, dtype=torch.bool)

    class Attends(torch.nn.Module):
        def forward(self, q, keep):
            return additive_attention(q, q, q, keep, None, None, **{**PLAIN, "causal": "top_left"})

    program = torch.export.export(Attends(), (q, keep))
    inputs = {n for n in program.graph.nodes if n.op == "placeholder"}
    reached = set(inputs)
    for node in program.graph.nodes:
        if node.op == "call_function" and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            assert node.target._opname not in ("where", "masked_fill", "lt", "gt", "eq", "ne", "logical_not", "bitwise_not")


def test_dropout_is_refused():
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(LoweringError, match=r"dropout is for training; got 0\.5"):
        additive_attention(q, q, q, None, None, None, **{**PLAIN, "dropout_p": 0.5})
