"""The program for torch_npu: what it calls, that it holds no weights and no pickle, and that it is right."""

import pytest
import torch
from safetensors.torch import save_file

from checks import encoder_graph
from test_ascend_lower_attention import BIASED, CAUSAL, captured
from tilecut.make_cases import make_cases
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.run_passes import run_passes
from tilecut_runtime.npu_attention import OP
from tilecut_runtime.torch_program import WEIGHTS, read_program
from tilecut_targets.ascend.npu_program import NPU_PROGRAM, npu_program, write_npu_program

LIMIT = 2e-3


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    pruned = encoder_graph()
    fused = pruned.copy()
    run_passes(fused, [FuseAttention()])
    facts = write_npu_program(fused, folder)
    save_file({k: v.detach().contiguous() for k, v in pruned.tensors.items()}, folder / WEIGHTS)
    return folder, facts


def test_it_calls_the_op_once_a_layer_and_asserts_no_device(written):
    folder, facts = written
    program = read_program(folder / NPU_PROGRAM, folder / WEIGHTS)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called.count(OP) == 2 and facts == {
        "npu_attention": 2, "npu_norms": 0, "npu_rotary": 0, "npu_refusals": [],
    }  # fmt: skip
    assert torch.ops.aten.transpose.int not in called
    assert torch.ops.aten._assert_tensor_metadata.default not in called
    node = next(n for n in program.graph.nodes if n.target is OP)
    assert node.kwargs["scale"] == 0.25 and node.kwargs["input_layout"] == "BSND"


def test_read_again_it_gives_what_the_pruned_model_gives(written):
    folder, _ = written
    run = read_program(folder / NPU_PROGRAM, folder / WEIGHTS).module()
    for case in make_cases(encoder_graph(), sizes=((1, 1), (1, 8), (5, 33))):
        with torch.no_grad():
            out = run(**{k: torch.from_numpy(v) for k, v in case.inputs.items()})
        assert case.error({k: v.numpy() for k, v in out.items()}) <= LIMIT


def test_the_weights_are_not_in_it(written):
    folder, _ = written
    table = encoder_graph().tensor("embed.weight").detach().numpy().tobytes()
    assert table[:64] not in (folder / NPU_PROGRAM).read_bytes()
    assert table in (folder / WEIGHTS).read_bytes()


def test_what_the_op_does_not_take_becomes_matmul_and_softmax():
    program, lowered = npu_program(captured(BIASED, CAUSAL))
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called.count(OP) == 1 and torch.ops.aten.softmax.int in called
    assert torch.ops.tilecut.attention.default not in called
    (refusal,) = lowered.refusals
    assert "additive bias" in refusal.why
