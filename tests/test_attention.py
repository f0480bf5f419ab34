"""tilecut::attention against float64 references, its gradients, and its life as a torch op."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tilecut_runtime.attention import attention
from tilecut_runtime.errors import InputError

OP = torch.ops.tilecut.attention.default
OPTIONS = {"scale": 0.3, "causal": "none", "window": [-1, -1], "global_tokens": 0, "softcap": 0.0, "dropout_p": 0.0}


def operands(hq=4, hk=2, sq=5, sk=7, d=8, e=6, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
    return make(2, hq, sq, d), make(2, hk, sk, d), make(2, hk, sk, e)


def loops(q, k, v, key_padding, bias, slopes, scale, causal, window, global_tokens, softcap):
    """The meaning again, one score at a time, in Python floats."""
    b, hq, sq, _ = q.shape
    hk, sk = k.shape[1], k.shape[2]
    out = torch.zeros(b, hq, sq, v.shape[-1], dtype=torch.float64)
    shift = 0 if causal == "top_left" else sk - sq
    for n, h, i in itertools.product(range(b), range(hq), range(sq)):
        scores = {}
        for j in range(sk):
            group = h // (hq // hk)
            behind = i + shift - j
            inside = (window[0] < 0 or behind <= window[0]) and (window[1] < 0 or -behind <= window[1])
            if not (inside or (global_tokens and (j < global_tokens or i + shift < global_tokens))):
                continue
            if (causal != "none" and behind < 0) or (key_padding is not None and not key_padding[n, j]):
                continue
            s = float(q[n, h, i] @ k[n, group, j]) * scale
            s = math.tanh(s / softcap) * softcap if softcap else s
            s += float(bias.expand(b, hq, sq, sk)[n, h, i, j]) if bias is not None else 0.0
            scores[j] = s - (float(slopes[h]) * abs(behind) if slopes is not None else 0.0)
        total = sum(math.exp(s) for s in scores.values())
        for j, s in scores.items():
            out[n, h, i] += math.exp(s) / total * v[n, h // (hq // hk), j]
    return out


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1), (0, -1)])
@pytest.mark.parametrize(
    ("padded", "biased", "alibi", "softcap", "global_tokens"),
    [
        (False, False, False, 0.0, 0),
        (True, False, False, 0.0, 0),
        (True, True, False, 2.0, 0),
        (False, False, True, 0.0, 2),
        (True, True, True, 1.5, 1),
    ],
)
def test_equals_the_loops(causal, window, padded, biased, alibi, softcap, global_tokens):
    q, k, v = operands()
    key_padding = torch.tensor([[True] * 7, [False, True, True, False, True, False, False]]) if padded else None
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64) if biased else None
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64) if alibi else None
    options = {"causal": causal, "window": window, "global_tokens": global_tokens, "softcap": softcap, "scale": 0.4}
    got = attention(q, k, v, key_padding, bias, slopes, **options)
    assert torch.allclose(got, loops(q, k, v, key_padding, bias, slopes, **options), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_sdpa(dtype):
    q, k, v = operands(hk=4, e=8, sq=7, dtype=dtype)
    padding = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    want = F.scaled_dot_product_attention(q, k, v, padding[:, None, None, :])
    assert torch.allclose(attention(q, k, v, padding), want, atol=8 * torch.finfo(dtype).eps)


def test_a_row_without_a_key_is_zero():
    q, k, v = operands()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0] = True
    out = attention(q, k, v, padding)
    assert not out[1].any()
    assert out[0].abs().min() > 0


@pytest.mark.parametrize(
    ("causal", "softcap"), list(itertools.product(["none", "top_left", "bottom_right"], [0.0, 1.5]))
)
def test_gradients(causal, softcap):
    q, k, v = operands(sq=3, sk=4, d=2, e=3, grad=True)
    bias = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[True, True, True, False], [True, False, True, True]])
    run = lambda q, k, v, bias: attention(q, k, v, padding, bias, causal=causal, softcap=softcap)
    assert torch.autograd.gradcheck(run, (q, k, v, bias))


def test_opcheck():
    q, k, v = operands(dtype=torch.float32, grad=True)
    padding, bias = torch.rand(2, 7) > 0.3, torch.randn(1, 1, 5, 7, requires_grad=True)
    torch.library.opcheck(OP, (q, k, v, padding, bias, None), OPTIONS)
    torch.library.opcheck(
        OP, (q, k, v, None, None, torch.rand(4)), {**OPTIONS, "causal": "bottom_right", "softcap": 3.0}
    )


class Attends(torch.nn.Module):
    def forward(self, q, k, v, padding):
        return attention(q, k, v, padding, causal="top_left")


def test_it_stays_one_node_in_export_and_compile():
    q, k, v = operands(dtype=torch.float32)
    padding = torch.ones(2, 7, dtype=torch.bool)
    b, s, t = torch.export.Dim("b"), torch.export.Dim("s"), torch.export.Dim("t")
    shapes = ({0: b, 2: s}, {0: b, 2: t}, {0: b, 2: t}, {0: b, 1: t})
    program = torch.export.export(Attends(), (q, k, v, padding), dynamic_shapes=shapes)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [OP]
    compiled = torch.compile(Attends(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q, k, v, padding), Attends()(q, k, v, padding))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 5, 8)}, r"q has the wrong rank; got \[2, 5, 8\]; wanted \[B, H, S, D\]"),
        (
            {"k": torch.randn(2, 3, 7, 8), "v": torch.randn(2, 3, 7, 6)},
            "no multiple of KV heads; got 4 query heads, 3 KV heads",
        ),
        ({"k": torch.randn(2, 2, 7, 9)}, "k does not fit q"),
        ({"v": torch.randn(2, 2, 6, 6)}, "v does not fit k"),
        ({"v": torch.randn(2, 2, 7, 6).half()}, "v differs from q in dtype or device"),
        ({"key_padding": torch.ones(2, 7)}, "key_padding does not fit"),
        ({"key_padding": torch.ones(2, 6, dtype=torch.bool)}, "key_padding does not fit"),
        ({"bias": torch.randn(4, 5, 7)}, "bias does not broadcast"),
        ({"alibi_slopes": torch.randn(3)}, "alibi_slopes does not fit"),
        ({"causal": "left"}, "unknown causal"),
        ({"window": (1, 2, 3)}, "window must be"),
        ({"dropout_p": 0.1}, "dropout is not implemented"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    q, k, v = operands(dtype=torch.float32)
    with pytest.raises(InputError, match=message):
        attention(**{"q": q, "k": k, "v": v, **change})
