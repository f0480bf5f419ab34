"""Whole models pruned by half and compiled for chips of three families: fused nodes, and the verify twin's numbers."""

import onnx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from checks import compiled, emit, minilm_folder, randomise, text_batch
from tilecut import PruneConfig, compile_pruned
from tilecut_passes.capture import capture
from tilecut_runtime.reference import read_cases
from tilecut_runtime.session import load
from tilecut_targets.ascend import npu_ops
from tilecut_targets.ascend.target import ATC_MODEL, AscendTarget


@pytest.fixture(scope="module", autouse=True)
def no_private_environments():
    """As on a machine without them, whatever this one has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilecut_targets.ascend.target.is_installed", lambda name: False)
        yield

CHIPS = ("Ascend910B3", "Ascend310P3", "Ascend310B1")
LIMITS = {"Ascend910B3": 2e-3, "Ascend310P3": 2e-3, "Ascend310B1": 1e-4}
HALF = PruneConfig(sparsity=0.5, at={"sequence": 16})


def gpt2():
    config = GPT2Config(
        n_embd=64, n_inner=512, n_layer=2, n_head=4, vocab_size=99, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return randomise(GPT2LMHeadModel(config).eval())


def llama():
    config = LlamaConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=99, max_position_embeddings=512,
    )  # fmt: skip
    return randomise(LlamaForCausalLM(config).eval())


def batches(length=16):
    made = [text_batch(4, length, seed=i) for i in range(4)]
    return [{k: b[k] for k in ("input_ids", "attention_mask")} for b in made]


def fused_nodes(artifact):
    graph = onnx.load(str(artifact.path / ATC_MODEL), load_external_data=False).graph
    return [n for n in graph.node if npu_ops.is_fused(n)]


def twin_error(artifact):
    """The largest error of the twin, over the artifact's ragged cases."""
    session = load(artifact.path, device="reference")
    return max(case.error(session.run(case.inputs)) for case in read_cases(artifact.path, artifact.manifest))


def why(artifact):
    return [r["why"] for r in artifact.report["refusals"] if r["by"] == "LowerAttention"]


def check(artifact, chip, layers):
    assert twin_error(artifact) <= LIMITS[chip]
    assert {r.name: r.status for r in artifact.manifest.verification}["verify twin equals pruned model"] == "passed"
    found = fused_nodes(artifact)
    assert artifact.report["emitted"]["fused_attention"] == len(found)
    if chip == "Ascend910B3":
        assert len(found) == layers and not why(artifact)
    else:
        # Padding at run time is no mask of a fixed length, and 310B has no op.
        assert not found and len(why(artifact)) == layers
        assert all(("multiples of 128" if chip == "Ascend310P3" else "no fused attention") in one for one in why(artifact))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_minilm(chip, tmp_path):
    artifact = compile_pruned(
        str(minilm_folder()), f"ascend:{chip}", None, None,
        PruneConfig(sparsity=0.5, method="magnitude", reconstruct=False), tmp_path / "a",
        measure=False,
    )  # fmt: skip
    found = check(artifact, chip, 6)
    assert all(len(n.input) == 5 for n in found)


@pytest.mark.parametrize("chip", [pytest.param(c, marks=[] if c == CHIPS[0] else pytest.mark.slow) for c in CHIPS])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_causal_models(make, chip, tmp_path):
    artifact = compiled(f"ascend:{chip}", tmp_path / "a", model=make(), calibration=batches(), config=HALF)
    found = check(artifact, chip, 2)
    # Causal and padded: a full mask, and nothing computed above the diagonal.
    for node in found:
        held = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (held["sparse_mode"], held["next_tokens"], held["inner_precise"]) == (0, 0, 2)
        if make is llama:
            assert held["num_heads"] == 2 * held["num_key_value_heads"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, llama])
def test_fp16_files(make, tmp_path):
    artifact = compiled("ascend:fp16", tmp_path / "a", model=make(), calibration=batches(), config=HALF)
    check(artifact, "Ascend910B3", 2)


def test_310p_runs_the_op_at_a_fixed_length(tmp_path):
    example = {k: v for k, v in text_batch(2, 128).items() if k != "token_type_ids"}
    calibration = [{k: v[:2] for k, v in one.items()} for one in batches(128)]
    artifact = compiled(
        "ascend:Ascend310P3", tmp_path / "a", model=llama(), example_inputs=example, dynamic_shapes={},
        calibration=calibration, config=PruneConfig(sparsity=0.5, at={"sequence": 128}),
    )  # fmt: skip
    assert twin_error(artifact) <= 2e-3 and not why(artifact)
    found = fused_nodes(artifact)
    assert len(found) == 2
    for node in found:
        assert npu_ops.illegal(node, "p310") is None


def test_packed_segments_become_a_mask(tmp_path):
    """Position ids that start again within a row: other sequences are dropped, and the op stays."""
    ids = torch.randint(0, 99, (2, 9))
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 0]])
    graph = capture(llama(), {"input_ids": ids, "position_ids": places})
    made = emit(AscendTarget(), graph, tmp_path / "packed")
    assert made.written.facts["fused_attention"] == 2
    assert not [r for r in made.lowered.refusals if r.by == "LowerAttention"]
    twin = {r.name: r for r in AscendTarget().verify(made.folder, made.manifest, made.cases)}
    assert twin["verify twin equals pruned model"].status == "passed"
