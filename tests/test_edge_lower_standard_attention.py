"""ai.onnx Attention: every form that it can say equals the op's naive twin in onnxruntime; the others are left alone."""

import itertools

import onnx
import pytest
import torch
from torch import nn

from checks import op_names, run_onnx
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.attention import attention
from tilecut_targets.decompose_attention import decomposed_attention
from tilecut_targets.edge.lower_standard_attention import LowerStandardAttention
from tilecut_targets.edge.onnx_ops import PORTABLE_OPSET
from tilecut_targets.write_onnx import write_onnx

FORMS = {
    "plain": {},
    "padding": {"padded": True},
    "causal": {"causal": "top_left"},
    "causal and padding": {"causal": "bottom_right", "padded": True},
    "window": {"window": (2, 1), "padded": True},
    "causal window with global tokens": {"causal": "top_left", "window": (2, 0), "global_tokens": 1},
    "bias": {"bias": (1, 4)},
    "bias of one row and one head, padding": {"bias": (1, 1), "padded": True, "causal": "top_left"},
    "grouped": {"kv": 2, "padded": True},
    "one kv head": {"kv": 1},
    "wider values": {"width": 6, "padded": True},
}


class Attends(nn.Module):
    """Two attentions under one rule, 4 query heads of 8."""

    def __init__(self, kv=4, width=8, padded=False, bias=None, **rule):
        super().__init__()
        self.padded, self.rule = padded, {"scale": 0.4, **rule}
        self.bias = None if bias is None else nn.Parameter(torch.randn(*bias, 16, 16))
        self.kv, self.width = kv, width

    def forward(self, q, k, v, mask):
        keep = mask != 0 if self.padded else None
        length = q.shape[2]
        bias = None if self.bias is None else self.bias[..., :length, :length]
        once = attention(q, k, v, keep, bias, **self.rule)
        return once, attention(q + 1, k, v, keep, bias, **self.rule)


def made(form, batch=2, length=7):
    module = Attends(**form)
    inputs = {
        "q": torch.randn(batch, 4, length, 8), "k": torch.randn(batch, module.kv, length, 8),
        "v": torch.randn(batch, module.kv, length, module.width), "mask": torch.ones(batch, length, dtype=torch.int64),
    }  # fmt: skip
    inputs["mask"][-1, length - 3 :] = 0
    return module, inputs


@pytest.mark.parametrize("name", FORMS)
def test_the_op_gives_what_the_naive_twin_gives(name, tmp_path):
    module, example = made(FORMS[name])
    dims = {n: {0: "batch", 2 if n != "mask" else 1: "sequence"} for n in example}
    graph = capture(module, example, dims)
    lowered = graph.copy()
    assert run_passes(lowered, [LowerStandardAttention()])[0].rewrites == 2
    assert not lowered.refusals and op_names(lowered).split().count("attention") == 2
    assert LowerStandardAttention()(lowered) == 0
    write_onnx(lowered, tmp_path / "a.onnx", PORTABLE_OPSET)
    nodes = onnx.load(str(tmp_path / "a.onnx")).graph.node
    fused = [n for n in nodes if n.op_type == "Attention"]
    assert len(fused) == 2 and not {n.domain for n in nodes} - {""}
    # One mask for both.
    assert len({n.input[3] for n in fused if len(n.input) > 3}) <= 1
    for batch, length in itertools.product((1, 3), (4, 11)):
        _, inputs = made(FORMS[name], batch, length)
        got = run_onnx(tmp_path / "a.onnx", inputs)
        for have, want in zip(got.values(), graph.run(inputs).values(), strict=True):
            # A query that sees no key has no agreed value.
            seen = want.abs().sum(-1) > 0
            assert seen.any() and torch.allclose(have[seen], want[seen], atol=1e-5)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"softcap": 5.0}, "soft-cap or ALiBi"),
        ({"dropout_p": 0.1}, "dropout"),
    ],
)
def test_what_the_op_cannot_say_is_left_alone_with_the_reason(form, why):
    module, example = made(form)
    graph = capture(module, example)
    assert LowerStandardAttention()(graph) == 0
    assert [r.by for r in graph.refusals] == ["LowerStandardAttention"] * 2
    assert all(why in r.why for r in graph.refusals)


class Shifted(nn.Module):
    def forward(self, q, k):
        return attention(q, k, k, causal="bottom_right", scale=1.0)


def test_causal_attention_over_a_past_is_left_alone(tmp_path):
    graph = capture(Shifted(), {"q": torch.randn(2, 2, 3, 4), "k": torch.randn(2, 2, 5, 4)})
    assert LowerStandardAttention()(graph) == 0
    assert "different numbers of queries and keys" in graph.refusals[0].why
    write_onnx(graph, tmp_path / "a.onnx", PORTABLE_OPSET, {torch.ops.tilecut.attention.default: decomposed_attention})
    inputs = {"q": torch.randn(1, 2, 3, 4), "k": torch.randn(1, 2, 5, 4)}
    (got,) = run_onnx(tmp_path / "a.onnx", inputs).values()
    assert torch.allclose(got, graph.run(inputs)["output"], atol=1e-5)


def test_a_query_that_sees_no_key_is_finite(tmp_path):
    module, example = made({"causal": "top_left", "padded": True})
    graph = capture(module, example)
    run_passes(graph, [LowerStandardAttention()])
    write_onnx(graph, tmp_path / "a.onnx", PORTABLE_OPSET)
    example["mask"][:, :3] = 0
    assert all(out.isfinite().all() for out in run_onnx(tmp_path / "a.onnx", example).values())
