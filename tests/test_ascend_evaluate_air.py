"""GE models made by hand: read back, executed against torch, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from tilecut_runtime.attention import attention_naive
from tilecut_runtime.errors import ArtifactError, LoweringError
from tilecut_runtime.npu_attention import ALL_TOKENS
from tilecut_runtime.rotary import rotary_naive
from tilecut_targets.ascend.evaluate_air import ATTRIBUTE_DTYPES, evaluate_air
from tilecut_targets.ascend.read_air import DTYPES, Operator, read_air, write_operators

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
R = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))


def one(kind, given, **attributes):
    """A graph of one operator on constants; "" among them is an input that is left out."""
    made = [Operator(f"in_{i}", "Const", (), {"value": t}) for i, t in enumerate(given) if isinstance(t, torch.Tensor)]
    names = [f"in_{i}:0" if isinstance(t, torch.Tensor) else "" for i, t in enumerate(given)]
    return [*made, Operator("op", kind, tuple(names), attributes), Operator("out", "NetOutput", ("op:0",), {})]


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kind", "given", "attributes", "want"),
    [
        ("MatMulV2", [X[0], X[1]], {"transpose_x2": True}, X[0] @ X[1].T),
        ("BatchMatMul", [X, X], {"adj_x1": True, "adj_x2": False}, X.transpose(1, 2) @ X),
        ("LayerNormV4", [X, ints(4), X[0, 0], X[0, 1]], {"epsilon": 1e-5}, F.layer_norm(X, [4], X[0, 0], X[0, 1])),
        ("RotaryMul", [R, R[:1, :, :1], R[1:, :, :1]], {}, rotary_naive(R, R[:1, :, :1], R[1:, :, :1], interleaved=False)),
        ("RotaryPositionEmbedding", [R, R, R, ""], {}, rotary_naive(R, R, R, interleaved=False)),
        ("RotaryPositionEmbedding", [R, R, R], {"mode": 1}, rotary_naive(R, R, R, interleaved=True)),
        ("IndexByTensor", [X, ints(1, 0, 1)], {"indices_mask": [1]}, X[[1, 0, 1]]),
        ("IndexByTensor", [X, ints(1, 0), ints(2, 3)], {"indices_mask": [1, 0, 1]}, X[[1, 0], :, [2, 3]]),
        ("GatherElements", [X, X.argsort(1)], {"dim": 1}, X.sort(1).values),
        ("ClipByValueV2", [X, torch.tensor(-0.5), torch.tensor(0.5)], {}, X.clamp(-0.5, 0.5)),
        ("Tile", [X, ints(2, 1, 3)], {}, X.repeat(2, 1, 3)),
        ("RmsNorm", [X, X[0, 0]], {"epsilon": 1e-6}, F.rms_norm(X, [4], X[0, 0], 1e-6)),
        ("SoftmaxV2", [X], {"axes": [-1]}, X.softmax(-1)),
        ("GeluV2", [X], {}, F.gelu(X)),
        ("GeluV2", [X], {"approximate": b"tanh"}, F.gelu(X, approximate="tanh")),
        ("Swish", [X], {"scale": 1.0}, F.silu(X)),
        ("ReduceMean", [X, ints(-1)], {"keep_dims": True}, X.mean(-1, keepdim=True)),
        ("GatherV2", [X, ints(2, 0), ints(1)], {}, X[:, [2, 0]]),
        ("GatherV2", [X, ints(2, 0), ints(-2)], {}, X[:, [2, 0]]),
        ("Gather", [ints(5, 6, 7), torch.tensor(1)], {}, torch.tensor(6)),
        ("StridedSliceV2", [X, ints(1), ints(9223372036854775807), ints(2), ints(2)], {}, X[:, :, 1::2]),
        ("SplitV", [X, ints(1, -1), ints(2)], {}, X[..., :1]),
        ("Shape", [X], {"dtype": 9}, ints(2, 3, 4)),
        ("Cast", [X], {"dst_type": 1}, X.half()),
        ("Unsqueeze", [X], {"axes": [0, -1]}, X[None, ..., None]),
        ("BroadcastTo", [X[:, :1], ints(2, 3, 4)], {}, X[:, :1].expand(2, 3, 4)),
        ("ConcatV2", [X, X, ints(-1)], {"N": 2}, torch.cat([X, X], -1)),
        ("Pack", [torch.tensor(2), ints(5)], {"axis": 0}, ints(2, 5)),
        ("Range", [torch.tensor(1), torch.tensor(7), torch.tensor(2)], {}, ints(1, 3, 5)),
        ("Fill", [ints(2, 2), torch.tensor(0.5)], {}, torch.full((2, 2), 0.5)),
        ("MaskedFill", [X, X > 0, torch.tensor(9.0)], {}, X.masked_fill(X > 0, 9.0)),
        ("SelectV2", [X > 0, X, -X], {}, X.abs()),
    ],
)
def test_an_operator_is_what_torch_says(tmp_path, kind, given, attributes, want):
    path = tmp_path / "one.air"
    write_operators(one(kind, given, **attributes), path)
    (got,) = evaluate_air(read_air(path), {})
    torch.testing.assert_close(got, want)


def test_products_are_summed_wide_and_rounded_once():
    x = torch.full((1, 4096), 1.0).half()
    (got,) = evaluate_air(one("MatMul", [x, torch.full((4096, 1), 0.5).half()]), {})
    assert got.dtype == torch.float16 and got.item() == 2048


def test_the_fused_attention_is_the_references():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 6, 16, generator=generator) for h in (4, 2))
    keep = torch.arange(6)[None] < torch.tensor([6, 3])[:, None]
    drop = ~keep[:, None, None, :].expand(2, 1, 6, 6)
    attributes = {
        "num_heads": 4, "num_key_value_heads": 2, "scale": 0.25, "input_layout": b"BNSD", "sparse_mode": 0,
        "pre_tokens": ALL_TOKENS, "next_tokens": ALL_TOKENS,
    }  # fmt: skip
    graph = one("FusedInferAttentionScore", [q, k, k, "", drop, *[""] * 22], **attributes)
    want = attention_naive(
        q, k, k, keep, None, None, scale=0.25, causal="none", window=(-1, -1), global_tokens=0, softcap=0.0, dropout_p=0.0
    )  # fmt: skip
    torch.testing.assert_close(evaluate_air(graph, {})[0], want)
    graph = one("FusedInferAttentionScore", [q, k, k, drop, drop], **attributes)
    with pytest.raises(LoweringError, match="an input besides query, key, value and atten_mask"):
        evaluate_air(graph, {})


def test_inputs_go_by_name_and_outputs_by_place(tmp_path):
    path = tmp_path / "two.air"
    data = [Operator(name, "Data", (), {"index": i}, ((-1, 4),)) for i, name in enumerate(("b", "a"))]
    graph = [*data, Operator("s", "Sub", ("a:0", "b:0"), {}), Operator("o", "NetOutput", ("s:0", "a:0"), {})]
    write_operators(graph, path)
    read = read_air(path)
    assert [(op.name, op.type, op.shapes) for op in read[:2]] == [("b", "Data", ((-1, 4),)), ("a", "Data", ((-1, 4),))]
    first, second = evaluate_air(read, {"a": X[0], "b": X[1]})
    assert torch.equal(first, X[0] - X[1]) and torch.equal(second, X[0])


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_constants_of_every_type_come_back(tmp_path, dtype):
    value = torch.tensor([[0, 1], [3, 2]]).to(dtype)
    write_operators([Operator("c", "Const", (), {"value": value})], tmp_path / "c.air")
    assert torch.equal(read_air(tmp_path / "c.air")[0].attributes["value"], value)
    assert dtype in ATTRIBUTE_DTYPES.values()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (one("FlashFish", [X]), "evaluate_air: op: an operator that the evaluator does not know; got FlashFish; add it to"),
        (one("MatMul", [X[0], X[0]]), "evaluate_air: op: MatMul cannot be computed"),
        (one("Cast", [X], dst_type=99), "Cast cannot be computed"),
        (one("Neg", [X])[:-1], "the graph has no NetOutput"),
    ],
)
def test_what_cannot_be_executed_is_one_error(graph, message):
    with pytest.raises(LoweringError, match=message):
        evaluate_air(graph, {})


@pytest.mark.parametrize("content", [b"\xff" * 40, b""])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "x.air").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a GE model"):
        read_air(tmp_path / "x.air")


def test_a_constant_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "c.air"
    write_operators([Operator("c", "Const", (), {"value": torch.arange(4)})], path)
    held = path.read_bytes()
    # The shape says 5 where there are 4.
    path.write_bytes(held.replace(b"\x0a\x01\x04", b"\x0a\x01\x05"))
    with pytest.raises(ArtifactError, match="constant c is damaged"):
        read_air(path)
