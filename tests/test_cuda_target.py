"""target="cuda": a program in which every attention is one op, that runs on a CPU too, and rungs that say what was run."""

import numpy as np
import pytest
import torch

from checks import TinyEncoder, emit, encoder_graph, randomise
from tilecut.make_cases import make_case, make_inputs
from tilecut_passes.capture import capture
from tilecut_runtime.errors import ArtifactError
from tilecut_runtime.load_cubins import KERNELS
from tilecut_runtime.session import load
from tilecut_runtime.torch_program import WEIGHTS, read_program
from tilecut_targets.cuda.chips import ARCHS
from tilecut_targets.cuda.target import MODEL, CudaTarget

OP = torch.ops.tilecut.attention.default
GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    return emit(CudaTarget(), encoder_graph(), tmp_path_factory.mktemp("cuda") / "artifact")


@pytest.fixture(scope="module")
def program(emitted):
    return read_program(emitted.folder / MODEL, emitted.folder / WEIGHTS)


def test_the_program_calls_one_attention_a_layer_and_nothing_was_decomposed(emitted, program):
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called.count(OP) == 2
    assert torch.ops.aten.linear.default in called and torch.ops.aten.layer_norm.default in called
    assert not {"scaled_dot_product_attention", "softmax", "matmul", "bmm"} & {str(t).split(".")[1] for t in called}
    facts = emitted.written.facts
    assert (facts["fused_attention"], facts["attention"], facts["dtype"]) == (2, 2, "float32")
    assert emitted.written.entry == {"model": MODEL, "kernels": KERNELS}
    assert CudaTarget().lowering == ()


def test_the_mask_travels_as_key_padding(program):
    for node in program.graph.nodes:
        if node.target is OP:
            padding, bias, slopes = node.args[3:6]
            assert padding.meta["val"].dtype == torch.bool and padding.meta["val"].ndim == 2
            assert bias is None and slopes is None


def inputs(batch, length, seed=0):
    return make_inputs(encoder_graph(), batch, length, seed)


def assert_agrees(session, batch, length):
    given = inputs(batch, length)
    want = encoder_graph().run(given)
    got = session.run({k: v.numpy() for k, v in given.items()})
    rows = given["attention_mask"].numpy() != 0
    assert list(got) == ["hidden", "first"]
    np.testing.assert_allclose(got["hidden"][rows], want["hidden"].numpy()[rows], atol=1e-4)
    np.testing.assert_allclose(got["first"], want["first"].numpy(), atol=1e-4)


SHAPES = [(1, 1), (3, 7), (8, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_runs_on_the_cpu_when_asked_to(emitted, shape):
    session = load(emitted.folder, device="cpu")
    assert session.device == "cpu"
    assert_agrees(session, *shape)


@pytest.mark.skipif(GPU, reason="there is one here")
def test_without_a_gpu_the_default_device_says_what_to_do(emitted):
    with pytest.raises(ArtifactError, match=r'no CUDA device on this machine; load it with device="cpu"'):
        load(emitted.folder)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_it_runs_on_the_gpu(emitted, shape):
    session = load(emitted.folder)
    assert session.device == "cuda"
    assert_agrees(session, *shape)


def test_a_right_program_passes_and_the_gpu_is_said_to_be_not_run(emitted):
    equal, kernels, device = CudaTarget().verify(emitted.folder, emitted.manifest, emitted.cases)
    assert (equal.name, equal.status, equal.limit) == ("artifact equals pruned model", "passed", 1e-4)
    assert equal.figure is not None and equal.figure < 1e-5
    assert (kernels.name, kernels.status, kernels.figure) == ("kernels fit", "passed", 0)
    assert all(arch in kernels.detail for arch in ARCHS)
    assert (device.name, device.status, device.figure) == ("CUDA device", "not run", None)
    assert "needs an NVIDIA GPU" in device.detail


def test_a_program_of_another_model_fails(emitted):
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    other = capture(randomise(TinyEncoder(), seed=1), example)
    given = inputs(2, 9)
    equal, *_ = CudaTarget().verify(emitted.folder, emitted.manifest, [make_case(given, other.run(given))])
    assert equal.status == "failed"
    assert equal.figure is not None and equal.figure > 1e-2


def test_the_weights_are_in_the_folder_once(emitted):
    weights = sum(t.nbytes for t in encoder_graph().tensors.values())
    assert (emitted.folder / WEIGHTS).stat().st_size > weights
    table = encoder_graph().tensor("embed.weight").detach().numpy().tobytes()
    assert table in (emitted.folder / WEIGHTS).read_bytes()
    assert table[:64] not in (emitted.folder / MODEL).read_bytes()
