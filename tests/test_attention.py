"""tilecut::attention against float64 references, its gradients, and its life as a torch op."""

import io
import itertools
import math
import shutil
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import tilecut_runtime.attention as attention_module
from tilecut_runtime.attention import attention
from tilecut_runtime.attention_checks import check_dense
from tilecut_runtime.errors import InputError
from tilecut_runtime.philox import rand

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


def plain(q, k, v, padding, bias, causal, window, softcap, slopes, dropout=None):
    """The meaning as one differentiable expression, for rows that see a key."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    sq, sk = q.shape[2], k.shape[2]
    score = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    if softcap:
        score = (score / softcap).tanh() * softcap
    place = torch.arange(sq)[:, None] + (0 if causal == "top_left" else sk - sq)
    score = score + bias - slopes[:, None, None] * (place - torch.arange(sk)).abs()
    hidden = ~padding[:, None, None, :] | (place - torch.arange(sk) > window)
    if causal != "none":
        hidden = hidden | (torch.arange(sk) > place)
    weights = score.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights if dropout is None else weights * dropout) @ v


GRADIENTS = list(itertools.product(["none", "top_left", "bottom_right"], [0.0, 1.5], [0.0, 0.3], [(1, 4), (2, 1)]))


@pytest.mark.parametrize(("causal", "softcap", "dropout_p", "broadcast"), GRADIENTS)
def test_gradients_are_those_of_the_plain_expression(causal, softcap, dropout_p, broadcast):
    q, k, v = operands(sq=5, sk=6, grad=True)
    bias = torch.randn(*broadcast, 5, 6, dtype=torch.float64, requires_grad=True)
    # Key 0 stays, so that every row sees one.
    padding = torch.tensor([[True, True, True, False, True, True], [True, False, True, True, True, False]])
    slopes, seed = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64), torch.tensor([17])
    dropout = mask_by_triton(2, 4, 5, 6, seed, dropout_p) / (1 - dropout_p)
    want = plain(q, k, v, padding, bias, causal, 4, softcap, slopes, dropout)
    options = {"causal": causal, "window": (4, -1), "softcap": softcap, "dropout_p": dropout_p, "dropout_seed": seed}
    got = attention(q, k, v, padding, bias, slopes, **options)
    rows = torch.isfinite(want).all(-1)
    assert rows[:, :, 1:].all() and torch.allclose(got[rows], want[rows], atol=1e-12)
    weight = torch.randn_like(got) * rows[..., None]
    expected = torch.autograd.grad(want.masked_fill(~rows[..., None], 0.0).mul(weight).sum(), (q, k, v, bias))
    for mine, other in zip(torch.autograd.grad(got.mul(weight).sum(), (q, k, v, bias)), expected):
        assert torch.allclose(mine, other, atol=1e-12)


def mask_by_triton(b, hq, sq, sk, seed, p):
    """The dropout mask written pair by pair: `tl.rand` at (seed + b * Hq + h, i * Sk + j), which test_philox holds up."""
    mask = torch.empty(b, hq, sq, sk, dtype=torch.float64)
    for n, h, i, j in itertools.product(range(b), range(hq), range(sq), range(sk)):
        mask[n, h, i, j] = rand(seed + n * hq + h, torch.tensor([i * sk + j])).item() > torch.tensor(p).item()
    return mask


def test_gradcheck():
    q, k, v = operands(sq=3, sk=4, d=2, e=3, grad=True)
    bias = torch.randn(1, 4, 1, 4, dtype=torch.float64, requires_grad=True)
    # Batch row 1 sees nothing.
    padding = torch.tensor([[True, True, True, False], [False] * 4])
    options = {"causal": "bottom_right", "softcap": 1.5, "dropout_p": 0.2, "dropout_seed": torch.tensor([3])}
    run = lambda q, k, v, bias: attention(q, k, v, padding, bias, **options)
    assert torch.autograd.gradcheck(run, (q, k, v, bias))
    dq, dk, dv = torch.autograd.grad(run(q, k, v, bias).sum(), (q, k, v))
    assert not any(g[1].any() for g in (dq, dk, dv)) and all(g[0].any() for g in (dq, dk, dv))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(dtype):
    wide = [x.requires_grad_() for x in operands(e=8)]
    half = [x.detach().to(dtype).requires_grad_() for x in wide]
    for x in (wide, half):
        attention(*x, causal="bottom_right").float().square().sum().backward()
    for x, y in zip(wide, half):
        assert y.grad.dtype == dtype
        assert (x.grad - y.grad).norm() < 4 * torch.finfo(dtype).eps * x.grad.norm()


@pytest.mark.parametrize(("sq", "sk"), [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_sizes_of_none_and_one(sq, sk):
    q, k, v = operands(sq=sq, sk=sk, grad=True)
    out = attention(q, k, v, causal="bottom_right")
    assert out.shape == (2, 4, sq, 6)
    out.sum().backward()
    if not sq * sk:
        assert not out.any() and not q.grad.any() and not v.grad.any()
    else:
        assert torch.allclose(out, v.repeat_interleave(2, 1)) and (v.grad == 2).all()
        assert q.grad.abs().max() < 1e-14


def test_dropout_is_drawn_from_torchs_generator():
    q, k, v = operands(dtype=torch.float32)
    torch.manual_seed(1)
    first, second = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), first)
    seed = torch.tensor([5])
    assert torch.equal(*(attention(q, k, v, dropout_p=0.5, dropout_seed=seed) for _ in range(2)))


def test_dropout_keeps_the_mean():
    q, k, v = operands(dtype=torch.float64)
    outs = [attention(q, k, v, dropout_p=0.3, dropout_seed=torch.tensor([1000 * i])) for i in range(2000)]
    assert (torch.stack(outs).mean(0) - attention(q, k, v)).abs().max() < 0.1
    assert (torch.stack(outs).std(0) > 0.05).any()


def test_autocast_casts_as_sdpa_does():
    q, k, v = operands(hk=4, e=8, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, want = attention(q, k.bfloat16(), v), F.scaled_dot_product_attention(q, k.bfloat16(), v)
    assert out.dtype == want.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.any()


def test_there_is_no_second_gradient_and_none_of_the_slopes():
    q, k, v = operands(grad=True)
    (once,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="Trying to backward through tilecut.attention_backward"):
        once.square().sum().backward()
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(InputError, match="alibi_slopes gets no gradient; detach them, or pass"):
        attention(q, k, v, None, None, slopes).sum().backward()


SEED = torch.tensor([7])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("op", ["attention", "attention_forward", "attention_backward"])
def test_opcheck(op, transposed):
    q, k, v = operands(dtype=torch.float32, e=8)
    if transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    padding, bias, slopes = torch.rand(2, 7) > 0.3, torch.randn(1, 1, 5, 7), torch.rand(4)
    capped = {**OPTIONS, "causal": "bottom_right", "softcap": 3.0, "dropout_p": 0.2}
    if op == "attention":
        q, k, v, bias = (x.detach().requires_grad_() for x in (q, k, v, bias))
        torch.library.opcheck(OP, (q, k, v, padding, bias, None), OPTIONS)
        torch.library.opcheck(OP, (q, k, v, None, None, slopes), {**capped, "dropout_seed": SEED})
    elif op == "attention_forward":
        torch.library.opcheck(torch.ops.tilecut.attention_forward, (q, k, v, padding, bias, slopes, SEED), capped)
    else:
        masks = (padding, bias, slopes, SEED)
        out, lse = torch.ops.tilecut.attention_forward(q, k, v, *masks, **capped)
        given = (torch.randn_like(out), q, k, v, out, lse, *masks)
        for bias_grad in (True, False):
            torch.library.opcheck(torch.ops.tilecut.attention_backward, given, {**capped, "bias_grad": bias_grad})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lse_is_the_natural_log_of_the_sum(dtype):
    q, k, v = operands(hk=4, dtype=dtype)
    padding = torch.tensor([[True] * 7, [False] * 7])
    _, lse = torch.ops.tilecut.attention_forward(q, k, v, padding, None, None, None, **OPTIONS)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = (q[0].double() @ k[0].double().mT * 0.3).exp().sum(-1).log()
    assert torch.allclose(lse[0].double(), want, atol=1e-5) and (lse[1] == -torch.inf).all()


class Attends(torch.nn.Module):
    def __init__(self, dropout_p=0.0):
        super().__init__()
        self.linear, self.dropout_p = torch.nn.Linear(8, 8), dropout_p

    def forward(self, q, k, v, padding):
        return attention(self.linear(q), k, v, padding, causal="top_left", dropout_p=self.dropout_p)


def calls(graph):
    return [str(n.target) for n in graph.nodes if n.op == "call_function" and "tilecut" in str(n.target)]


def test_it_is_one_node_of_an_exported_program_which_reloads():
    q, k, v = operands(dtype=torch.float32)
    padding = torch.ones(2, 7, dtype=torch.bool)
    b, s, t = torch.export.Dim("b"), torch.export.Dim("s"), torch.export.Dim("t")
    shapes = ({0: b, 2: s}, {0: b, 2: t}, {0: b, 2: t}, {0: b, 1: t})
    module = Attends()
    program = torch.export.export(module, (q, k, v, padding), dynamic_shapes=shapes)
    assert calls(program.graph) == calls(program.run_decompositions().graph) == ["tilecut.attention.default"]
    (node,) = [n for n in program.graph.nodes if n.target == OP]
    assert "dropout_seed" not in node.kwargs or node.kwargs["dropout_seed"] is None
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    q, k, v = (torch.randn(3, heads, n, w) for heads, n, w in ((4, 9, 8), (2, 4, 8), (2, 4, 6)))
    padding = torch.ones(3, 4, dtype=torch.bool)
    assert torch.allclose(again(q, k, v, padding), module(q, k, v, padding))


def recording(graphs):
    """A backend of torch.compile that keeps what it is given."""

    def keep(graph, _):
        graphs.append(calls(graph.graph))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_it_is_one_node_forward_and_one_backward(dropout_p, dynamic):
    q, k, v = operands(dtype=torch.float32, grad=True)
    padding, module, graphs = torch.ones(2, 7, dtype=torch.bool), Attends(dropout_p), []
    compiled = torch.compile(module, fullgraph=True, backend=recording(graphs), dynamic=dynamic)
    torch.manual_seed(3)
    out = compiled(q, k, v, padding)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert graphs == [["tilecut.attention_forward.default"], ["tilecut.attention_backward.default"]]
    torch.manual_seed(3)
    want = module(q, k, v, padding)
    assert torch.allclose(out, want)
    for mine, other in zip(found, torch.autograd.grad(want.square().sum(), (q, k, v))):
        assert torch.allclose(mine, other, atol=1e-6)
    graphs.clear()
    with torch.no_grad():
        compiled(q, k, v, padding)
    assert graphs == [["tilecut.attention.default"]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_inductor_finds_the_layouts_that_the_fakes_promise():
    linear = torch.nn.Linear(32, 96)

    def layer(x):
        q, k, v = linear(x).view(*x.shape[:2], 4, 24).transpose(1, 2).chunk(3, -1)
        return attention(q, k, v, causal="top_left").transpose(1, 2).flatten(2).relu()

    x = torch.randn(2, 5, 32, requires_grad=True)
    got, want = torch.compile(layer, fullgraph=True)(x), layer(x)
    assert torch.allclose(got, want, atol=1e-6)
    (found,), (wanted,) = (torch.autograd.grad(out.square().sum(), x) for out in (got, want))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_cuda_tensors_go_to_the_launcher(monkeypatch):
    """The launcher's side of the contract, with the twin in its place and CPU tensors in that of CUDA ones."""
    q, k, v = operands(dtype=torch.float32)
    given = {}

    def forward(q, k, v, *, max_q, max_k, **options):
        given.update(options, max_q=max_q, max_k=max_k)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        masks = (options.pop(name) for name in ("key_padding", "bias", "alibi_slopes", "dropout_seed"))
        return torch.ops.tilecut.attention_forward(q, k, v, *masks, **options)

    def backward(grad, q, k, v, out, lse, *, max_q, max_k, need_dbias, **options):
        assert grad.stride(-1) == out.stride(-1) == 1 and lse.shape == q.shape[:3]
        masks = [options.pop(name) for name in ("key_padding", "bias", "alibi_slopes", "dropout_seed")]
        grads = torch.ops.tilecut.attention_backward(grad, q, k, v, out, lse, *masks, **options, bias_grad=need_dbias)
        return *grads[:3], grads[3] if need_dbias else None

    launcher = types.SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setitem(sys.modules, "tilecut_runtime.launch_attention", launcher)
    masks = (torch.rand(2, 7) > 0.3, torch.randn(1, 4, 5, 7), None, SEED)
    options = {**OPTIONS, "causal": "bottom_right", "window": [3, -1], "dropout_p": 0.2}
    q = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    out, lse = attention_module._forward_cuda(q, k, v, *masks, **options)
    want, want_lse = torch.ops.tilecut.attention_forward(q, k, v, *masks, **options)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert (given["max_q"], given["max_k"], given["causal"], given["window"]) == (5, 7, "bottom_right", [3, -1])
    grad = torch.ones(()).expand(out.shape)
    for bias_grad in (True, False):
        options["bias_grad"] = bias_grad
        found = attention_module._backward_cuda(grad, q, k, v, out, lse, *masks, **options)
        wanted = torch.ops.tilecut.attention_backward(grad, q, k, v, out, lse, *masks, **options)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted))
        assert found[3].shape == ((1, 4, 5, 7) if bias_grad else (0,))


@pytest.mark.parametrize("op", ["attention", "attention_forward", "attention_backward"])
def test_other_devices_have_no_implementation(op):
    has = lambda key: torch._C._dispatch_has_kernel_for_dispatch_key(f"tilecut::{op}", key)
    assert has("CPU") and has("CUDA") and not any(has(key) for key in ("XPU", "MPS", "PrivateUse1"))


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
        ({"window": (-2, 1)}, r"window must be \(left, right\); got \[-2, 1\]"),
        ({"global_tokens": -1}, "global_tokens must not be negative; got -1"),
        ({"softcap": -1.0}, "softcap must not be negative; got -1.0"),
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\); got 1.0"),
        ({"dropout_p": -0.1}, "dropout_p must lie"),
        ({"dropout_p": 0.1, "dropout_seed": torch.tensor([1], dtype=torch.int32)}, "dropout_seed does not fit"),
        ({"dropout_p": 0.1, "dropout_seed": torch.tensor(1)}, "dropout_seed does not fit"),
        ({"bias": torch.ones(1, 1, 5, 7, dtype=torch.bool)}, "bias must be floating point; got torch.bool"),
        ({"alibi_slopes": torch.ones(4, dtype=torch.int64)}, "alibi_slopes does not fit; got torch.int64"),
        ({name: torch.ones(2, 4, 5, 8, dtype=torch.int64) for name in "qkv"}, "q, k, v must be floating point"),
        (
            {"k": torch.randn(2, 2, 7, 8, device="meta")},
            "k differs from q in dtype or device; got torch.float32 on meta",
        ),
        ({"bias": torch.randn(1, 1, 5, 7, device="meta")}, "bias is on another device than q; got meta; wanted cpu"),
        ({"alibi_slopes": torch.rand(4, device="meta")}, "alibi_slopes is on another device"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    q, k, v = operands(dtype=torch.float32)
    with pytest.raises(InputError, match=message):
        attention(**{"q": q, "k": k, "v": v, **change})


def test_the_op_itself_refuses_too():
    q, k, v = operands(dtype=torch.float32)
    with pytest.raises(InputError, match="dropout needs a dropout_seed"):
        OP(q, k, v, None, None, None, **{**OPTIONS, "dropout_p": 0.1})
    with pytest.raises(InputError, match="v does not fit k"):
        OP(q, k, v[:, :, 1:], None, None, None, **OPTIONS)


class OnCuda:
    """A tensor that says it is on a GPU."""

    def __init__(self, tensor):
        self.tensor, self.device = tensor, torch.device("cuda", 0)

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.mark.parametrize(
    ("dtype", "d", "e", "message"),
    [
        (torch.float64, 8, 8, "the kernels have no such dtype; got torch.float64"),
        (
            torch.float16,
            12,
            8,
            "cannot take the head width of q; got 12; wanted a multiple of 8 up to 256; pad the heads",
        ),
        (torch.float16, 8, 20, "cannot take the head width of v; got 20"),
        (torch.float16, 264, 8, "cannot take the head width of q; got 264"),
    ],
)
def test_what_only_the_kernels_refuse(dtype, d, e, message):
    options = {**OPTIONS, "dropout_seed": None}
    q, k, v = operands(d=d, e=e, dtype=dtype)
    attention(q, k, v)
    with pytest.raises(InputError, match=message):
        check_dense(OnCuda(q), OnCuda(k), OnCuda(v), None, None, None, **options)
    q, k, v = (OnCuda(x) for x in operands(d=24, e=256, dtype=torch.bfloat16))
    check_dense(q, k, v, None, None, None, **options)
    with pytest.raises(InputError, match="the kernels have no such dtype of bias; got torch.float64"):
        check_dense(q, k, v, None, OnCuda(torch.zeros(1, 1, 1, 1, dtype=torch.float64)), None, **options)
