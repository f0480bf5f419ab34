"""PromptFlashAttention as ONNX: the node that torch's exporter writes, and the function that says what it means."""

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

HALF = TensorProto.FLOAT16
# Outputs are fp16: an error of one unit in its last place, at magnitudes up to 4.
LIMIT = 2e-3


def model(heads, kv_heads, has_mask, scale, kind=HALF):
    """A model of one node, with its meaning as a local function."""
    names = ["query", "key", "value"]
    drop = [helper.make_tensor_value_info("drop", TensorProto.BOOL, ["b", 1, "sq", "sk"])]
    values = [helper.make_tensor_value_info(n, kind, ["b", "n", "s" + n, "d"]) for n in names]
    node = helper.make_node(
        npu_ops.OP, [*names, "", "drop"] if has_mask else names, ["out"], domain=npu_ops.DOMAIN,
        num_heads=heads, scale_value=scale, pre_tokens=npu_ops.ALL_TOKENS, next_tokens=npu_ops.ALL_TOKENS,
        input_layout="BNSD", num_key_value_heads=kv_heads, sparse_mode=0, inner_precise=0,
    )  # fmt: skip
    out = helper.make_tensor_value_info("out", kind, ["b", "n", "squery", "d"])
    graph = helper.make_graph([node], "one", values + drop * has_mask, [out])
    opsets = [helper.make_opsetid("", npu_ops.ONNX_OPSET), helper.make_opsetid(npu_ops.DOMAIN, 1)]
    made = helper.make_model(
        graph, opset_imports=opsets, functions=[npu_ops.reference_function(has_mask)], ir_version=9
    )
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


def meaning(q, k, v, padding=None, causal="none", scale=0.3):
    q, k, v = (t.double() for t in (q, k, v))
    return attention_naive(
        q, k, v, padding, None, None, scale=scale, causal=causal, window=[-1, -1], global_tokens=0, softcap=0.0, dropout_p=0
    )  # fmt: skip


SIZES = [(1, 1), (5, 5), (3, 8), (7, 4)]
HEADS = [(1, 1), (4, 4), (4, 1), (6, 2)]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_without_a_mask_the_function_is_attention(heads, kv_heads, sq, sk):
    q, k, v = operands(heads, kv_heads, sq, sk)
    got = run(model(heads, kv_heads, False, 0.3), q, k, v)
    assert got.dtype == torch.float16
    assert (got.double() - meaning(q, k, v)).abs().max() < LIMIT


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_a_masks_true_means_drop(heads, kv_heads, sq, sk, padded, causal):
    q, k, v = operands(heads, kv_heads, sq, sk)
    padding = torch.ones(2, sk, dtype=torch.bool)
    if padded:
        padding[1, 1::2] = False
    behind = torch.arange(sq)[:, None] + (0 if causal == "top_left" else sk - sq) - torch.arange(sk)
    keep = padding[:, None, None, :] & ((behind >= 0) | (causal == "none"))
    keep = keep.expand(2, 1, sq, sk)
    got = run(model(heads, kv_heads, True, 0.3), q, k, v, ~keep)
    want = meaning(q, k, v, padding, causal)
    rows = keep.any(-1).expand(-1, heads, -1)
    assert rows.any() and got.isfinite().all()
    assert (got.double() - want)[rows].abs().max() < LIMIT
    if not keep.all():
        assert (got.double() - meaning(q, k, v)).abs().max() > 10 * LIMIT


def test_the_function_keeps_the_dtype_it_is_given():
    q, k, v = operands(4, 2, 5, 5, dtype=torch.float32)
    got = run(model(4, 2, False, 0.3, TensorProto.FLOAT), q, k, v)
    assert got.dtype == torch.float32
    assert (got.double() - meaning(q, k, v)).abs().max() < 1e-6


@pytest.mark.parametrize("has_mask", [False, True])
def test_the_functions_inputs_number_three_or_five(has_mask):
    function = npu_ops.reference_function(has_mask)
    assert (function.domain, function.name) == ("npu", "NPUPromptFlashAttention")
    assert list(function.input) == ["query", "key", "value", "pse_shift", "atten_mask"][: 5 if has_mask else 3]
    assert list(function.attribute) == list(npu_ops.ATTRIBUTES)


class Ops(nn.Module):
    """The op in every spelling of its mask; all of them with a mask, as one function needs it, or none."""

    def __init__(self, always_mask):
        super().__init__()
        self.always_mask = always_mask

    def forward(self, q, k, v, padding):
        given = {"scale": 0.3, "always_mask": self.always_mask}
        op = npu_ops.prompt_flash_attention
        if not self.always_mask:
            return (op(q, k, v, None, causal="none", **given),)
        return (
            op(q, k, v, None, causal="none", **given),
            op(q, k, v, padding, causal="none", **given),
            op(q, k, v, None, causal="top_left", **given),
            op(q, k, v, padding, causal="bottom_right", **given),
        )


@pytest.mark.parametrize("always_mask", [True, False])
def test_what_torch_writes_is_the_ops_node_in_half_precision(tmp_path, always_mask):
    q, k, v = operands(4, 2, 5, 7, dtype=torch.float32)
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "padding": torch.tensor([[True] * 7, [True, False, True, True, False, True, False]]),
    }
    outputs = Ops(always_mask)(**inputs)
    assert all(o.dtype == torch.float32 and o.shape == q.shape for o in outputs)
    names = [f"o{i}" for i in range(len(outputs))]
    program = torch.export.export(Ops(always_mask), (), inputs)
    torch.onnx.export(
        program, (), str(tmp_path / "m.onnx"), opset_version=npu_ops.ONNX_OPSET, output_names=names, verbose=False
    )  # fmt: skip
    made = onnx.load(str(tmp_path / "m.onnx"))
    kinds = {t.name: t.type.tensor_type.elem_type for t in made.graph.value_info}
    fused = [n for n in made.graph.node if n.domain == npu_ops.DOMAIN]
    assert len(fused) == len(outputs)
    for node in fused:
        assert len(node.input) == (5 if always_mask else 3)
        assert [kinds[name] for name in node.input[:3]] == [HALF] * 3
        if always_mask:
            assert node.input[3] == "" and node.input[4]
        held = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert held == {
            "num_heads": 4, "num_key_value_heads": 2, "scale_value": pytest.approx(0.3), "input_layout": b"BNSD",
            "pre_tokens": 2147483647, "next_tokens": 2147483647, "sparse_mode": 0, "inner_precise": 0,
        }  # fmt: skip
    made.functions.append(npu_ops.reference_function(always_mask))
    onnx.save(made, str(tmp_path / "m.onnx"))
    got = run_onnx(tmp_path / "m.onnx", {i.name: inputs[i.name] for i in made.graph.input})
    masks = [(None, "none"), (inputs["padding"], "none"), (None, "top_left"), (inputs["padding"], "bottom_right")]
    for name, (padding, causal) in zip(names, masks):
        want = attention(q, k, v, padding, causal=causal, scale=0.3)
        assert largest_error({name: want}, got) < LIMIT, name


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_torchs(approximate):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert torch.allclose(npu_ops.gelu(x, approximate), F.gelu(x, approximate=approximate), atol=1e-12)
    assert np.isclose(float(npu_ops.gelu(torch.tensor(1.0))), 0.8413447)
