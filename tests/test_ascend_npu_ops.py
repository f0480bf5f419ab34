"""PromptFlashAttention as ONNX: the node that torch's exporter writes, and the functions that say what it means."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

from checks import run_onnx
from tilecut_passes.run_passes import largest_error
from tilecut_runtime.attention import attention, attention_naive
from tilecut_targets.ascend import npu_ops
from tilecut_targets.ascend.legality import ALL_TOKENS
from tilecut_targets.ascend.make_twin import make_twin

HALF = TensorProto.FLOAT16
# Outputs are fp16: an error of one unit in its last place, at magnitudes up to 4.
LIMIT = 2e-3


def model(heads, kv_heads, mode=None, scale=0.3, kind=HALF, before=ALL_TOKENS, after=ALL_TOKENS):
    """A model of one node, with its meaning as a local function; `mode` None is without a mask."""
    names = ["query", "key", "value"]
    drop = [helper.make_tensor_value_info("drop", TensorProto.BOOL, ["db", "dn", "dq", "dk"] if mode == 0 else [2048, 2048])]
    values = [helper.make_tensor_value_info(n, kind, ["b", "n", "s" + n, "d"]) for n in names]
    node = helper.make_node(
        npu_ops.OP, names if mode is None else [*names, "", "drop"], ["out"], domain=npu_ops.DOMAIN, num_heads=heads,
        scale_value=scale, pre_tokens=before, next_tokens=after, input_layout="BNSD", num_key_value_heads=kv_heads,
        sparse_mode=mode or 0, inner_precise=0,
    )  # fmt: skip
    out = helper.make_tensor_value_info("out", kind, ["b", "n", "squery", "d"])
    graph = helper.make_graph([node], "one", values + drop * (mode is not None), [out])
    opsets = [helper.make_opsetid("", npu_ops.ONNX_OPSET), helper.make_opsetid(npu_ops.DOMAIN, 1)]
    made = make_twin(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    onnx.checker.check_model(made)
    return made


def operands(heads, kv_heads, sq, sk, d=16, b=2, dtype=torch.float16):
    make = lambda *shape: torch.randn(*shape).to(dtype)
    return make(b, heads, sq, d), make(b, kv_heads, sk, d), make(b, kv_heads, sk, d)


def run(made, q, k, v, drop=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"query": q.numpy(), "key": k.numpy(), "value": v.numpy()}
    return torch.from_numpy(session.run(None, feeds if drop is None else {**feeds, "drop": drop.numpy()})[0])


def meaning(q, k, v, padding=None, causal="none", window=(-1, -1), scale=0.3):
    q, k, v = (t.double() for t in (q, k, v))
    return attention_naive(
        q, k, v, padding, None, None, scale=scale, causal=causal, window=window, global_tokens=0, softcap=0.0, dropout_p=0
    )  # fmt: skip


SIZES = [(1, 1), (5, 5), (3, 8), (7, 4)]
HEADS = [(1, 1), (4, 4), (4, 1), (6, 2)]


@pytest.mark.parametrize(("mode", "causal"), [(None, "none"), (0, "none"), (2, "top_left")])
@pytest.mark.parametrize(("sq", "sk"), [(5, 5), (3, 8), (7, 4)])
def test_keys_beyond_the_lengths_are_dropped(sq, sk, mode, causal):
    q, k, v = operands(4, 2, sq, sk)
    made = model(4, 2, mode)
    node = made.graph.node[0]
    node.input.extend([""] * (6 - len(node.input)) + ["lengths"])
    made.graph.input.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, ["b"]))
    made.functions.clear()
    made = make_twin(made)
    assert made.functions[0].overload.endswith("_lengths")
    lengths = torch.tensor([sk, 2])
    drop = None if mode is None else torch.zeros(2, 1, sq, sk, dtype=torch.bool) if mode == 0 else npu_ops.triangle(2048)
    feeds = {"query": q, "key": k, "value": v, "lengths": lengths} | ({} if drop is None else {"drop": drop})
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {name: x.numpy() for name, x in feeds.items()})[0])
    keep = torch.arange(sk) < lengths[:, None]
    assert (got.double() - meaning(q, k, v, keep, causal)).abs().max() < LIMIT
    assert (got.double() - meaning(q, k, v, None, causal)).abs().max() > 10 * LIMIT


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_without_a_mask_the_function_is_attention(heads, kv_heads, sq, sk):
    q, k, v = operands(heads, kv_heads, sq, sk)
    got = run(model(heads, kv_heads), q, k, v)
    assert got.dtype == torch.float16
    assert (got.double() - meaning(q, k, v)).abs().max() < LIMIT


def test_no_kv_heads_are_as_many_as_query_heads():
    q, k, v = operands(4, 4, 5, 5)
    assert (run(model(4, 0), q, k, v).double() - meaning(q, k, v)).abs().max() < LIMIT


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_a_masks_true_means_drop(heads, kv_heads, sq, sk, padded, causal):
    q, k, v = operands(heads, kv_heads, sq, sk)
    padding = torch.ones(2, sk, dtype=torch.bool)
    if padded:
        padding[1, 1::2] = False
    drop = npu_ops.hidden_pairs(q, k, padding, None, causal=causal, window=(-1, -1), global_tokens=0)
    assert drop.shape == (2, 1, sq, sk)
    got = run(model(heads, kv_heads, 0), q, k, v, drop)
    want = meaning(q, k, v, padding, causal)
    rows = (~drop).any(-1).expand(-1, heads, -1)
    assert rows.any() and got.isfinite().all()
    assert (got.double() - want)[rows].abs().max() < LIMIT
    if drop.any():
        assert (got.double() - meaning(q, k, v)).abs().max() > 10 * LIMIT


def test_a_hidden_pair_of_the_models_own_is_dropped_with_the_rest():
    q, k, _ = operands(2, 2, 3, 4)
    hidden = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    hidden[0, 0, 2, 1] = True
    padding = torch.tensor([[True] * 4, [True, True, True, False]])
    drop = npu_ops.hidden_pairs(q, k, padding, hidden, causal="none", window=(-1, -1), global_tokens=0)
    assert drop[:, 0].nonzero().tolist() == [[0, 2, 1], [1, 0, 3], [1, 1, 3], [1, 2, 1], [1, 2, 3]]


@pytest.mark.parametrize(
    ("mode", "tokens", "causal", "window"),
    [
        (2, (0, 0), "top_left", (-1, -1)),
        (3, (0, 0), "bottom_right", (-1, -1)),
        (4, (2, 0), "bottom_right", (2, -1)),
        (4, (2, 1), "none", (2, 1)),
        (4, (ALL_TOKENS, 1), "none", (-1, 1)),
    ],
)
@pytest.mark.parametrize(("sq", "sk"), [(5, 5), (3, 8), (7, 4)])
def test_sparse_modes_hide_what_they_say_and_ignore_the_pattern_of_the_mask(mode, tokens, causal, window, sq, sk):
    q, k, v = operands(4, 2, sq, sk)
    got = run(model(4, 2, mode, before=tokens[0], after=tokens[1]), q, k, v, npu_ops.triangle(2048))
    drop = npu_ops.hidden_pairs(q, k, None, None, causal=causal, window=window, global_tokens=0)
    rows = (~drop).any(-1).expand(-1, 4, -1)
    assert drop.any() and rows.any()
    assert (got.double() - meaning(q, k, v, None, causal, window))[rows].abs().max() < LIMIT


def test_tokens_narrow_a_full_mask_too():
    q, k, v = operands(4, 2, 6, 6)
    seen = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    got = run(model(4, 2, 0, before=2, after=1), q, k, v, seen)
    assert (got.double() - meaning(q, k, v, None, "none", (2, 1))).abs().max() < LIMIT


def test_the_function_keeps_the_dtype_it_is_given():
    q, k, v = operands(4, 2, 5, 5, dtype=torch.float32)
    got = run(model(4, 2, kind=TensorProto.FLOAT), q, k, v)
    assert got.dtype == torch.float32
    assert (got.double() - meaning(q, k, v)).abs().max() < 1e-6


MASKINGS = [npu_ops.UNMASKED, *(f"sparse_mode_{i}" for i in (0, 2, 3, 4))]


@pytest.mark.parametrize("overload", [*MASKINGS, *(one + npu_ops.LENGTHS for one in MASKINGS)])
def test_the_functions_inputs_number_three_five_or_seven(overload):
    function = npu_ops.reference_function(overload)
    assert (function.domain, function.name, function.overload) == ("npu", "NPUPromptFlashAttention", overload)
    count = 7 if "lengths" in overload else 3 if overload == npu_ops.UNMASKED else 5
    names = ["query", "key", "value", "pse_shift", "atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv"]
    assert list(function.input) == names[:count]
    assert list(function.attribute) == list(npu_ops.ATTRIBUTES)


MASKS = [(None, "none"), ("padding", "none"), (None, "top_left"), ("padding", "bottom_right")]


class Ops(nn.Module):
    """The op with every kind of mask in one model."""

    def forward(self, q, k, v, padding):
        free = {"pre_tokens": ALL_TOKENS, "next_tokens": ALL_TOKENS}
        given = {"scale": 0.3, "kv_heads": 2, "inner_precise": 0, "expand": False}
        full = lambda keep, causal: npu_ops.hidden_pairs(
            q, k, keep, None, causal=causal, window=(-1, -1), global_tokens=0
        )
        op = npu_ops.prompt_flash_attention
        return (
            op(q, k, v, None, sparse_mode=0, **free, **given),
            op(q, k, v, full(padding, "none"), sparse_mode=0, **free, **given),
            op(q, k, v, npu_ops.triangle(2048), sparse_mode=2, pre_tokens=ALL_TOKENS, next_tokens=0, **given),
            op(q, k, v, full(padding, "bottom_right"), sparse_mode=0, **free, **given),
            op(q, k, v, None, sparse_mode=0, **free, **{**given, "kv_heads": 0, "expand": True}),
        )


def test_what_torch_writes_is_the_ops_node_in_half_precision(tmp_path):
    q, k, v = operands(4, 2, 5, 7, dtype=torch.float32)
    padding = torch.tensor([[True] * 7, [True, False, True, True, False, True, False]])
    inputs = {"q": q, "k": k, "v": v, "padding": padding}
    outputs = Ops()(**inputs)
    assert all(o.dtype == torch.float32 and o.shape == q.shape for o in outputs)
    names = [f"o{i}" for i in range(len(outputs))]
    program = torch.export.export(Ops(), (), inputs)
    torch.onnx.export(
        program, (), str(tmp_path / "m.onnx"), opset_version=npu_ops.ONNX_OPSET, output_names=names, verbose=False
    )  # fmt: skip
    made = onnx.load(str(tmp_path / "m.onnx"))
    kinds = {t.name: t.type.tensor_type.elem_type for t in made.graph.value_info}
    fused = [n for n in made.graph.node if npu_ops.is_fused(n)]
    assert [len(n.input) for n in fused] == [3, 5, 5, 5, 3]
    for node, mode, after, kv_heads in zip(fused, (0, 0, 2, 0, 0), [ALL_TOKENS] * 2 + [0] + [ALL_TOKENS] * 2, [2] * 4 + [0]):
        assert [kinds[name] for name in node.input[:3]] == [HALF] * 3
        if len(node.input) > 3:
            assert node.input[3] == "" and node.input[4]
        held = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert held == {
            "num_heads": 4, "num_key_value_heads": kv_heads, "scale_value": pytest.approx(0.3), "input_layout": b"BNSD",
            "pre_tokens": ALL_TOKENS, "next_tokens": after, "sparse_mode": mode, "inner_precise": 0,
        }  # fmt: skip
        assert npu_ops.illegal(node, "a2") is None
    twin = make_twin(made)
    assert [f.overload for f in twin.functions] == ["sparse_mode_0", "sparse_mode_2", "unmasked"]
    assert not made.functions
    onnx.save(twin, str(tmp_path / "m.onnx"))
    got = run_onnx(tmp_path / "m.onnx", {i.name: inputs[i.name] for i in made.graph.input})
    for name, (keep, causal) in zip(names, [*MASKS, (None, "none")]):
        want = attention(q, k, v, keep and inputs[keep], causal=causal, scale=0.3)
        assert largest_error({name: want}, got) < LIMIT, name


@pytest.mark.parametrize(
    ("change", "family", "broken"),
    [
        ({}, "p310", "the heads of one KV head, num_key_value_heads 0"),
        ({}, "b310", "b310 has no PromptFlashAttention in ONNX"),
        ({"num_heads": 257}, "a2", "the number of heads, the heads of one KV head"),
        ({"sparse_mode": 5}, "a2", "the sparse mode, a mask in sparse modes"),
        ({"input_layout": "NTD"}, "a2", "the layout"),
        ({"pre_tokens": None}, "a2", "no pre_tokens"),
        ({"num_key_value_heads": 0, "pre_tokens": 5}, "p310", "pre_tokens"),
        ({"num_key_value_heads": 0, "next_tokens": 5}, "p310", "next_tokens"),
    ],
)
def test_a_node_beyond_the_table_is_said_to_be(change, family, broken):
    node = model(4, 2).graph.node[0]
    held = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} | change
    given = {k: v for k, v in held.items() if v is not None}
    made = helper.make_node(npu_ops.OP, list(node.input), ["out"], name="one", domain=npu_ops.DOMAIN, **given)
    assert npu_ops.illegal(made, family) == f"one: {broken}"


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_torchs(approximate):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert torch.allclose(npu_ops.gelu(x, approximate), F.gelu(x, approximate=approximate), atol=1e-12)
    assert np.isclose(float(npu_ops.gelu(torch.tensor(1.0))), 0.8413447)
