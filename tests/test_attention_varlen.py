"""tilecut::attention_varlen against loops over its sequences, its gradients, its checks, and its life as a torch op."""

import io
import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import tilecut_runtime.attention_checks as checks_module
import tilecut_runtime.attention_varlen as varlen_module
from tilecut_runtime.attention import attention
from tilecut_runtime.attention_checks import check_packed_values
from tilecut_runtime.attention_varlen import attention_varlen
from tilecut_runtime.errors import InputError
from tilecut_runtime.philox import rand

OP = torch.ops.tilecut.attention_varlen.default
OPTIONS = {"scale": 0.3, "causal": "none", "window": [-1, -1], "global_tokens": 0, "softcap": 0.0, "dropout_p": 0.0}
# Equal lengths, length 1, nothing at all, no keys, no queries, fewer and more queries than keys.
LENGTHS = [(4, 4), (1, 1), (0, 0), (2, 0), (0, 3), (3, 6), (6, 3), (5, 5)]


def bounds(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(lengths=LENGTHS, hq=4, hk=2, d=8, e=6, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
    tq, tk = (sum(side) for side in zip(*lengths))
    tables = [bounds(side) for side in zip(*lengths)]
    return make(tq, hq, d), make(tk, hk, d), make(tk, hk, e), *tables


def longest(lengths=LENGTHS):
    max_q, max_k = (max(side) for side in zip(*lengths))
    return {"max_q": max_q, "max_k": max_k}


def is_visible(i, j, sq, sk, causal="none", window=(-1, -1), global_tokens=0):
    place = i if causal == "top_left" else i + sk - sq
    near = (window[0] < 0 or place - j <= window[0]) and (window[1] < 0 or j - place <= window[1])
    is_global = global_tokens > 0 and min(j, place) < global_tokens
    return (near or is_global) and (causal == "none" or j <= place)


def by_sequence(q, k, v, cu_q, cu_k, scale, softcap, slopes, see, dropout=None):
    """Sequence by sequence and head by head, one differentiable row at a time; `see(n, h, i, j, sq, sk)` is visibility."""
    outs, sums = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype), torch.full(q.shape[1::-1], -torch.inf)
    rows = {}
    for n in range(len(cu_q) - 1):
        (a, b), (c, d) = cu_q[n : n + 2].tolist(), cu_k[n : n + 2].tolist()
        for h, i in itertools.product(range(q.shape[1]), range(b - a)):
            seen = [j for j in range(d - c) if see(n, h, i, j, b - a, d - c)]
            if not seen:
                continue
            group = h // (q.shape[1] // k.shape[1])
            score = k[[c + j for j in seen], group] @ q[a + i, h] * scale
            score = (score / softcap).tanh() * softcap if softcap else score
            place = i if see.causal == "top_left" else i + d - c - b + a
            score = score - slopes[h] * (place - torch.tensor(seen)).abs()
            weights = score.softmax(0)
            if dropout is not None:
                weights = weights * torch.stack([dropout(n, h, i, j) for j in seen])
            rows[a + i, h] = weights @ v[[c + j for j in seen], group]
            sums[h, a + i] = score.detach().exp().sum().log()
    if rows:
        index = tuple(torch.tensor(list(rows)).T)
        outs = outs.index_put(index, torch.stack(list(rows.values())))
    return outs, sums


class See:
    def __init__(self, causal="none", window=(-1, -1), global_tokens=0, listed=None):
        self.causal, self.rules, self.listed = causal, {"window": window, "global_tokens": global_tokens}, listed

    def __call__(self, n, h, i, j, sq, sk):
        inside = self.listed is None or j // 64 in self.listed[h % len(self.listed)][n][i // 64]
        return inside and is_visible(i, j, sq, sk, self.causal, **self.rules)


CASES = [
    ({}, 0.0, False, 0.0),
    ({"causal": "top_left"}, 0.0, True, 0.0),
    ({"causal": "bottom_right", "window": (2, -1)}, 1.5, False, 0.0),
    ({"causal": "bottom_right"}, 0.0, True, 0.4),
    ({"window": (1, 1), "global_tokens": 1}, 2.0, True, 0.0),
    ({"window": (0, 2)}, 0.0, False, 0.5),
]


@pytest.mark.parametrize(("rules", "softcap", "alibi", "dropout_p"), CASES)
def test_values_and_gradients_are_those_of_the_sequences(rules, softcap, alibi, dropout_p):
    q, k, v, cu_q, cu_k = packed(grad=True)
    slopes, seed = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64) * alibi, torch.tensor([2**40 + 3])
    options = {"scale": 0.4, "softcap": softcap, "dropout_p": dropout_p, "dropout_seed": seed, **rules, **longest()}
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, alibi_slopes=slopes, **options)

    def dropout(n, h, i, j):
        drawn = rand(seed + n * 4 + h, torch.tensor([i * options["max_k"] + j]))
        return (drawn > dropout_p).double()[0] / (1 - dropout_p)

    want, sums = by_sequence(q, k, v, cu_q, cu_k, 0.4, softcap, slopes, See(**rules), dropout if dropout_p else None)
    assert torch.allclose(out, want, atol=1e-12) and torch.allclose(lse, sums.double(), atol=1e-5)
    assert not lse.requires_grad
    empty = torch.isneginf(lse.T)
    assert empty.any() and not out[empty].any() and (lse[:, 5:7] == -torch.inf).all()
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for mine, other in zip(found, torch.autograd.grad((want * weight).sum(), (q, k, v))):
        assert torch.allclose(mine, other, atol=1e-12)


def test_gradcheck():
    lengths = [(2, 3), (1, 0), (0, 1), (1, 1)]
    q, k, v, cu_q, cu_k = packed(lengths, 2, 1, 2, 3, grad=True)
    options = {"causal": "bottom_right", "softcap": 1.5, "dropout_p": 0.2, "dropout_seed": torch.tensor([3])}
    run = lambda q, k, v: attention_varlen(q, k, v, cu_q, cu_k, **options, **longest(lengths))[0]
    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_sdpa_of_every_sequence(dtype):
    lengths = [(7, 7), (3, 3), (12, 12)]
    q, k, v, cu, _ = packed(lengths, 4, 4, 8, 8, dtype=dtype)
    out, lse = attention_varlen(q, k, v, cu, cu, causal="top_left", **longest(lengths))
    assert out.dtype == dtype and lse.dtype == torch.float32
    for low, high in itertools.pairwise(cu.tolist()):
        one = [x[low:high].transpose(0, 1)[None] for x in (q, k, v)]
        want = F.scaled_dot_product_attention(*one, is_causal=True)[0].transpose(0, 1)
        assert torch.allclose(out[low:high], want, atol=8 * torch.finfo(dtype).eps)


def test_one_length_is_the_dense_op():
    q, k, v, cu_q, cu_k = packed([(5, 7)] * 3)
    options = {"causal": "bottom_right", "window": (3, -1), "dropout_p": 0.3, "dropout_seed": torch.tensor([9])}
    got, _ = attention_varlen(q, k, v, cu_q, cu_k, max_q=5, max_k=7, **options)
    batch = [x.unflatten(0, (3, -1)).transpose(1, 2) for x in (q, k, v)]
    assert torch.allclose(got, attention(*batch, **options).transpose(1, 2).flatten(0, 1), atol=1e-13)


@pytest.mark.parametrize("n", [0, 2])
def test_no_rows_at_all(n):
    q, k, v, cu_q, cu_k = packed([(0, 0)] * n or [(0, 0)])
    cu_q, cu_k = cu_q[: n + 1], cu_k[: n + 1]
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, max_q=0, max_k=0)
    assert out.shape == (0, 4, 6) and lse.shape == (4, 0)


BLOCK_LENGTHS = [(130, 70), (0, 5), (3, 200), (64, 64)]
# [head][sequence][query block] -> KV blocks.
LISTED = [
    [[[0], [1], [0, 1]], [], [[0, 3]], [[0]]],
    [[[], [0, 1], [1]], [], [[1, 2]], [[]]],
]


def block_list(listed):
    per_head = [[blocks for sequence in head for blocks in sequence] for head in listed]
    offsets, indices = [], []
    for head in per_head:
        row = [len(indices)]
        for blocks in head:
            indices += blocks
            row.append(len(indices))
        offsets.append(row)
    return torch.tensor(offsets, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_a_block_list_restricts_what_is_visible(heads, causal):
    q, k, v, cu_q, cu_k = packed(BLOCK_LENGTHS, 2, 1, 4, 4, grad=True)
    listed = LISTED[:heads]
    options = {"causal": causal, "scale": 0.5, **longest(BLOCK_LENGTHS)}
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, *block_list(listed), **options)
    want, sums = by_sequence(q, k, v, cu_q, cu_k, 0.5, 0.0, torch.zeros(2), See(causal, listed=listed))
    assert torch.allclose(out, want, atol=1e-12) and torch.allclose(lse, sums.double(), atol=1e-5)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for mine, other in zip(found, torch.autograd.grad((want * weight).sum(), (q, k, v))):
        assert torch.allclose(mine, other, atol=1e-12)


@pytest.mark.parametrize("op", ["attention_varlen", "attention_varlen_backward"])
@pytest.mark.parametrize("blocks", [False, True])
def test_opcheck(op, blocks):
    q, k, v, cu_q, cu_k = packed([(4, 4), (1, 2), (70, 66)], dtype=torch.float32)
    listed = block_list([[[[0]], [[0]], [[0, 1], [1]]]]) if blocks else (None, None)
    slopes, seed = torch.rand(4), torch.tensor([3])
    options = {**OPTIONS, "causal": "top_left", "softcap": 2.0, "dropout_p": 0.2, "max_q": 70, "max_k": 66}
    if op == "attention_varlen":
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        torch.library.opcheck(OP, (q, k, v, cu_q, cu_k, *listed, slopes), {**options, "dropout_seed": seed})
    else:
        out, lse = OP(q, k, v, cu_q, cu_k, *listed, slopes, **options, dropout_seed=seed)
        given = (torch.randn_like(out), q, k, v, out, lse, cu_q, cu_k, *listed, slopes, seed)
        torch.library.opcheck(torch.ops.tilecut.attention_varlen_backward, given, options)


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, q, k, v, cu_q, cu_k):
        limits = {"max_q": q.shape[0], "max_k": k.shape[0]}
        return attention_varlen(
            self.linear(q.flatten(1)).unflatten(1, (1, 8)), k, v, cu_q, cu_k, causal="top_left", **limits
        )


def calls(graph):
    return [str(n.target) for n in graph.nodes if n.op == "call_function" and "tilecut" in str(n.target)]


def test_it_is_one_node_of_an_exported_program_which_reloads():
    module, (q, k, v, cu_q, cu_k) = Attends(), packed(hq=1, hk=1, dtype=torch.float32)
    tq, tk, n = torch.export.Dim("tq"), torch.export.Dim("tk"), torch.export.Dim("n")
    shapes = ({0: tq}, {0: tk}, {0: tk}, {0: n}, {0: n})
    program = torch.export.export(module, (q, k, v, cu_q, cu_k), dynamic_shapes=shapes)
    assert calls(program.graph) == calls(program.run_decompositions().graph) == ["tilecut.attention_varlen.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    given = packed([(3, 5), (9, 4)], 1, 1, dtype=torch.float32)
    for got, want in zip(again(*given), module(*given)):
        assert torch.allclose(got, want)
    with pytest.raises(InputError, match="cu_seqlens_q: must not decrease; got 13, then 12 at index 2"):
        again(*given[:3], torch.tensor([0, 13, 12], dtype=torch.int32), given[4])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_it_is_one_node_forward_and_one_backward(dynamic):
    graphs = []

    def keep(graph, _):
        graphs.append(calls(graph.graph))
        return make_boxed_func(graph.forward)

    module, (q, k, v, cu_q, cu_k) = Attends(), packed(hq=1, hk=1, dtype=torch.float32, grad=True)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    out, lse = compiled(q, k, v, cu_q, cu_k)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert graphs == [["tilecut.attention_varlen.default"], ["tilecut.attention_varlen_backward.default"]]
    want, sums = module(q, k, v, cu_q, cu_k)
    assert torch.allclose(out, want) and torch.allclose(lse, sums) and not lse.requires_grad
    for mine, other in zip(found, torch.autograd.grad(want.square().sum(), (q, k, v))):
        assert torch.allclose(mine, other, atol=1e-6)


def test_cuda_tensors_go_to_the_launcher(monkeypatch):
    """The launcher's side of the contract, with the twin in its place and CPU tensors in that of CUDA ones."""

    def forward(q, k, v, *, cu_q, cu_k, block_offsets, block_indices, alibi_slopes, **options):
        return OP(q, k, v, cu_q, cu_k, block_offsets, block_indices, alibi_slopes, **options)

    def backward(grad, q, k, v, out, lse, *, cu_q, cu_k, block_offsets, block_indices, alibi_slopes, **options):
        tables = (cu_q, cu_k, block_offsets, block_indices, alibi_slopes, options.pop("dropout_seed"))
        return *torch.ops.tilecut.attention_varlen_backward(grad, q, k, v, out, lse, *tables, **options), None

    launcher = types.SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setitem(sys.modules, "tilecut_runtime.launch_attention", launcher)
    q, k, v, cu_q, cu_k = packed(BLOCK_LENGTHS, 2, 1, dtype=torch.float32)
    given = (q, k, v, cu_q, cu_k, *block_list(LISTED), torch.rand(2))
    options = {**OPTIONS, "causal": "bottom_right", "dropout_p": 0.2, **longest(BLOCK_LENGTHS)}
    seed = torch.tensor([4])
    out, lse = varlen_module._forward_cuda(*given, dropout_seed=seed, **options)
    assert all(torch.equal(x, y) for x, y in zip((out, lse), OP(*given, dropout_seed=seed, **options)))
    saved = (torch.ones_like(out), q, k, v, out, lse, *given[3:], seed)
    found = varlen_module._backward_cuda(*saved, **options)
    wanted = torch.ops.tilecut.attention_varlen_backward(*saved, **options)
    assert len(found) == 3 and all(torch.equal(x, y) for x, y in zip(found, wanted))


@pytest.mark.parametrize("op", ["attention_varlen", "attention_varlen_backward"])
def test_other_devices_have_no_implementation(op):
    has = lambda key: torch._C._dispatch_has_kernel_for_dispatch_key(f"tilecut::{op}", key)
    assert has("CPU") and has("CUDA") and not any(has(key) for key in ("XPU", "MPS", "PrivateUse1"))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 10, 4, 8)}, r"q has the wrong rank; got \[1, 10, 4, 8\]; wanted \[T, H, D\]"),
        ({"k": torch.randn(12, 3, 8), "v": torch.randn(12, 3, 6)}, "query heads are no multiple of KV heads"),
        ({"k": torch.randn(12, 2, 9)}, "k does not fit q"),
        ({"v": torch.randn(11, 2, 6)}, "v does not fit k"),
        ({"v": torch.randn(12, 2, 6).half()}, "v differs from q in dtype or device"),
        (
            {"cu_seqlens_q": torch.tensor([0, 4, 10])},
            r"cu_seqlens_q does not fit; got torch.int64 \[3\]; wanted torch.int32",
        ),
        ({"cu_seqlens_k": int32(0, 12)}, "differ in length"),
        ({"cu_seqlens_q": int32(1, 4, 10)}, r"cu_seqlens_q: must start at 0; got \[1\]"),
        ({"cu_seqlens_q": int32(), "cu_seqlens_k": int32()}, "cu_seqlens_q: must start at 0"),
        ({"cu_seqlens_q": int32(0, 4, 9)}, "cu_seqlens_q: must end at the number of rows; got 9; wanted 10"),
        ({"cu_seqlens_k": int32(0, 13, 12)}, "cu_seqlens_k: must not decrease; got 13, then 12 at index 2"),
        ({"max_q": 5}, "max_q is below the longest sequence; got 5; wanted at least 6 queries"),
        ({"max_k": 6}, "max_k is below the longest sequence; got 6; wanted at least 7 keys"),
        ({"block_offsets": int32(0)[None]}, "block_offsets and block_indices come together"),
        (
            {"block_offsets": int32(0, 1, 2)},
            r"block_offsets does not fit; got torch.int32 \[3\]; wanted torch.int32 \[4|1",
        ),
        ({"block_offsets": torch.tensor([[0, 1, 2]])}, "block_offsets does not fit; got torch.int64"),
        ({"block_offsets": int32(0, 1, 2).expand(2, 3)}, r"block_offsets does not fit; got torch.int32 \[2, 3\]"),
        ({"block_indices": torch.tensor([0, 0])}, "block_indices does not fit; got torch.int64"),
        (
            {"block_offsets": int32(0, 2)[None]},
            "block_offsets does not fit the sequences.*wanted 3 columns: 2 query blocks",
        ),
        ({"block_offsets": int32(0, 2, 1)[None]}, "block_offsets must rise through block_indices"),
        ({"block_offsets": int32(0, 1, 3)[None]}, "block_offsets must rise through block_indices.*wanted 0 to 2"),
        ({"block_offsets": int32(0, 1, 1)[None]}, "block_offsets must rise through block_indices"),
        ({"block_offsets": int32(0, 0, 1).expand(4, 3)}, "each head from where the last one ended"),
        (
            {"block_indices": int32(0, 1)},
            "a KV block of query block 1 is outside of its sequence; got 1; wanted 0 to 0",
        ),
        ({"block_indices": int32(-1, 0)}, "a KV block of query block 0 is outside"),
        ({"block_offsets": int32(0, 2, 2)[None]}, "query block 0 must rise, each listed once; got 0, then 0"),
        ({"alibi_slopes": torch.rand(3)}, "alibi_slopes does not fit"),
        ({"causal": "left"}, "unknown causal"),
        ({"window": (-2, 0)}, "window must be"),
        ({"softcap": -1.0}, "softcap must not be negative"),
        ({"dropout_p": 1.5}, "dropout_p must lie in"),
        (
            {"cu_seqlens_q": int32(0, 4, 10).to("meta")},
            "cu_seqlens_q is on another device than q; got meta; wanted cpu",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    q, k, v, cu_q, cu_k = packed([(4, 7), (6, 5)], dtype=torch.float32)
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_q": 6, "max_k": 7}
    if any("block" in name for name in change) and "together" not in message:
        given |= {"block_offsets": int32(0, 1, 2)[None], "block_indices": int32(0, 0)}
    with pytest.raises(InputError, match=message):
        attention_varlen(**{**given, **change})


def test_values_are_read_once_until_they_change(monkeypatch):
    q, k, _, cu_q, cu_k = packed([(4, 7), (6, 5)])
    offsets, indices = int32(0, 1, 2)[None], int32(0, 0)
    reads = []

    def spied(name):
        real = getattr(checks_module, name)

        def spy(*given):
            reads.append(name)
            return real(*given)

        monkeypatch.setattr(checks_module, name, spy)

    spied("_lengths")
    spied("_check_blocks")

    def check():
        with checks_module.eager_call():
            check_packed_values(q, k, cu_q, cu_k, offsets, indices, 6, 7)

    check()
    check()
    assert reads == ["_lengths", "_lengths", "_check_blocks"]
    cu_q[1] = 5
    check()
    assert reads[3:] == ["_lengths"]
    indices = indices.clone()
    check()
    assert reads[4:] == ["_check_blocks"]
    indices[0] = 1
    with pytest.raises(InputError, match="outside of its sequence"):
        check()
    cu_q[2] = 9
    with pytest.raises(InputError, match="must end at the number of rows"):
        check()


def test_tensors_of_inference_mode_are_read_every_time():
    q, k, _, _, cu_k = packed([(4, 7), (6, 5)])
    with torch.inference_mode():
        unversioned = bounds([4, 6])
        check_packed_values(q, k, unversioned, cu_k, None, None, 6, 7)
        unversioned[2] = 11
        with pytest.raises(InputError, match="must end at the number of rows"):
            check_packed_values(q, k, unversioned, cu_k, None, None, 6, 7)


def test_a_compiled_graph_may_reuse_the_memory_of_other_bounds():
    """Inductor gives two tensors of one size one Python object, and does not count its writes."""

    def run(q, lengths, others):
        one, _ = attention_varlen(q, q, q, *2 * (to_bounds(lengths),), max_q=25, max_k=25)
        two, _ = attention_varlen(one, q, q, *2 * (to_bounds(others),), max_q=10, max_k=10)
        return two

    def to_bounds(lengths):
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    q = torch.randn(30, 2, 8)
    given = (q, torch.tensor([25, 3, 2]), torch.tensor([10, 10, 10]))
    assert torch.allclose(torch.compile(run, fullgraph=True)(*given), run(*given), atol=1e-6)


def test_bounds_are_asserted_on_the_device_in_a_graph(monkeypatch):
    """With CPU tensors in the place of CUDA ones: nothing is read, and what does not fit stops."""
    q, k, _, cu_q, cu_k = packed([(4, 7), (6, 5)])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("a value was read"))
    check_packed_values(q, k, cu_q, cu_k, None, None, 6, 7)
    for wrong in (bounds([4, 5]), bounds([11, -1]), int32(1, 4, 10), bounds([3, 7])):
        with pytest.raises(RuntimeError, match="do not divide the rows"):
            check_packed_values(q, k, wrong, cu_k, None, None, 6, 7)
