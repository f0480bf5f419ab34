"""RmsNorm and RotaryPositionEmbedding as ONNX: the functions that say what they mean, and what the table allows of nodes."""

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from tilecut_runtime.rotary import rotary_naive
from tilecut_targets.ascend import npu_norms, npu_ops
from tilecut_targets.ascend.make_twin import fused_nodes, illegal, make_twin

KINDS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
DTYPES = pytest.mark.parametrize("dtype", KINDS)
# A unit in fp16's last place at magnitudes up to 8.
LIMIT = {torch.float32: 1e-6, torch.float16: 8e-3}


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, name="one", domain=npu_ops.DOMAIN, **attributes)


NORM = node(npu_norms.RMS_NORM, ["x", "gamma"], ["y", "rstd"], epsilon=1e-6)
HALF, PAIRS = (node(npu_norms.ROTARY, ["x", "cos", "sin"], ["y"], mode=mode) for mode in (0, 1))


def run(one, dtype=torch.float32, **given):
    """A model of one node by its function."""
    shapes = {name: [f"{name}_{d}" for d in range(t.ndim)] for name, t in given.items()}
    inputs = [helper.make_tensor_value_info(name, KINDS[dtype], shape) for name, shape in shapes.items()]
    kinds = {"y": KINDS[dtype], "rstd": TensorProto.FLOAT}
    outputs = [helper.make_tensor_value_info(name, kinds[name], [None] * given["x"].ndim) for name in one.output]
    graph = helper.make_graph([one], "one", inputs, outputs)
    opsets = [helper.make_opsetid("", npu_ops.ONNX_OPSET), helper.make_opsetid(npu_ops.DOMAIN, 1)]
    made = make_twin(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    onnx.checker.check_model(made)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {name: t.to(dtype).numpy() for name, t in given.items()})]


@DTYPES
@pytest.mark.parametrize("shape", [(1, 8), (2, 5, 8), (2, 3, 5, 6)])
@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_the_norm_is_torchs(dtype, shape, size):
    x, gamma = (torch.randn(*shape) * size).to(dtype), torch.randn(shape[-1]).to(dtype)
    y, rstd = run(NORM, dtype, x=x, gamma=gamma)
    assert y.dtype == dtype
    assert (y.double() - F.rms_norm(x.double(), shape[-1:], gamma.double(), 1e-6)).abs().max() < LIMIT[dtype]
    want = (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd, want, rtol=1e-5, atol=0)


def test_the_norm_ignores_its_epsilon_as_atcs_reader_does():
    x, gamma = torch.randn(2, 8) * 1e-3, torch.ones(8)
    other = node(npu_norms.RMS_NORM, ["x", "gamma"], ["y", "rstd"], epsilon=1.0)
    torch.testing.assert_close(run(other, x=x, gamma=gamma)[0], F.rms_norm(x, [8], gamma, 1e-6))


@DTYPES
@pytest.mark.parametrize(("one", "interleaved"), [(HALF, False), (PAIRS, True)])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [2, 8])
def test_the_rotary_embedding_is_tilecuts(dtype, one, interleaved, rows, width):
    x, cos, sin = (torch.randn(*s, width).to(dtype) for s in ((2, 5, 3), (rows, 5, 1), (rows, 5, 1)))
    (y,) = run(one, dtype, x=x, cos=cos, sin=sin)
    want = rotary_naive(x.double(), cos.double(), sin.double(), interleaved=interleaved)
    assert y.dtype == dtype and (y.double() - want).abs().max() < LIMIT[dtype]


def test_every_function_is_in_the_twin_once():
    graph = helper.make_graph([NORM, HALF, PAIRS, NORM], "four", [], [])
    model = helper.make_model(graph)
    twin = make_twin(model)
    assert [(f.name, f.overload) for f in twin.functions] == [
        ("NPURmsNorm", ""), ("NPURotaryPositionEmbedding", "half"), ("NPURotaryPositionEmbedding", "interleave"),
    ]  # fmt: skip
    assert [n.overload for n in fused_nodes(twin)] == ["", "half", "interleave", ""]
    assert not any(n.overload for n in model.graph.node)


@pytest.mark.parametrize("one", [NORM, HALF, PAIRS])
def test_what_the_lowering_writes_is_legal(one):
    assert illegal(one, "a2") is None


@pytest.mark.parametrize(
    ("one", "family", "broken"),
    [
        (NORM, "b310", "b310 has no RmsNorm in ONNX"),
        (NORM, "a950", "a950 has no RmsNorm in ONNX"),
        (HALF, "p310", "p310 has no RotaryPositionEmbedding in ONNX"),
        (node(npu_norms.RMS_NORM, ["x", "gamma"], ["y", "rstd"], epsilon=1e-5), "a2", "the epsilon"),
        (node(npu_norms.RMS_NORM, ["x", "gamma"], ["y"], epsilon=1e-6), "a2", "2 inputs and 2 outputs"),
        (node(npu_norms.ROTARY, ["x", "cos"], ["y"], mode=0), "a2", "3 inputs and 1 output"),
        (node(npu_norms.ROTARY, ["x", "cos", "sin"], ["y"], mode=2), "a2", "the mode"),
        (node(npu_norms.ROTARY, ["x", "cos", "sin"], ["y"]), "a2", "the mode"),
        (node("NPURotaryMul", ["x", "cos", "sin"], ["y"]), "a2", "a2 has no RotaryMul in ONNX"),
    ],
)
def test_what_breaks_the_table_is_named(one, family, broken):
    assert illegal(one, family) == f"one: {broken}"
