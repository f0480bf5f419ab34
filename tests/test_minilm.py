"""The real model: all-MiniLM-L6-v2 with its trained weights."""

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

from checks import minilm, minilm_folder, minilm_graph, random_plan, text_batch
from tilecut import PruneConfig, compile_pruned
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.mask import Mask
from tilecut_passes.prune import Prune
from tilecut_passes.run_passes import largest_error, run_passes

VOCABULARY = 30522


@pytest.mark.parametrize("seed", range(3))
def test_masked_dense_and_cut_agree(seed):
    plan = random_plan(minilm_graph(), seed)
    masked, pruned = minilm_graph().copy(), minilm_graph().copy()
    run_passes(masked, [Mask(plan)])
    run_passes(pruned, [Prune(plan)])
    assert sum(t.numel() for t in pruned.tensors.values()) < sum(t.numel() for t in minilm_graph().tensors.values())
    for batch, length in ((1, 1), (3, 17), (2, 128)):
        inputs = text_batch(batch, length, seed=seed, vocab=VOCABULARY)
        assert largest_error(masked.run(inputs), pruned.run(inputs)) < 1e-5


def test_the_captured_and_the_fused_graph_are_the_model():
    fused = minilm_graph().copy()
    run_passes(fused, [FuseAttention()])
    for batch, length in ((1, 1), (4, 33)):
        inputs = text_batch(batch, length, seed=length, vocab=VOCABULARY)
        with torch.no_grad():
            want = minilm()(**inputs)
        keep = inputs["attention_mask"] != 0
        for graph in (minilm_graph(), fused):
            got = graph.run(inputs)
            assert (got["last_hidden_state"] - want.last_hidden_state)[keep].abs().max() < 1e-5
            assert (got["pooler_output"] - want.pooler_output).abs().max() < 1e-5


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    texts = [f"A library that parses {what} files" for what in ("font", "sound", "text", "image", "mail", "web")]
    batches = [dict(tokenizer(texts[i:] + texts[:i], padding=True, return_tensors="pt")) for i in range(4)]
    return compile_pruned(
        minilm_folder(),
        calibration=batches,
        config=PruneConfig(sparsity=0.5, method="fisher", reconstruct=False),
        output=tmp_path_factory.mktemp("minilm") / "artifact",
        measure=False,
    )


def test_edge_holds_one_fused_attention_a_layer_at_half_the_work(artifact):
    emitted = artifact.report["emitted"]
    assert emitted["fused_attention"] == emitted["attention"] == 6
    macs = artifact.report["macs"]
    assert 0.48 < macs["prunable_pruned"] / macs["prunable_dense"] <= 0.5
    assert all(len(g.kept) % 16 == 0 for g in artifact.plan.groups if g.kind == "neurons")


def test_edge_agrees_with_the_pruned_torch_model_under_plain_onnxruntime(artifact):
    session = onnxruntime.InferenceSession(artifact.path / "model.onnx", providers=["CPUExecutionProvider"])
    module = artifact.module()
    for batch, length in ((1, 1), (2, 3), (3, 31), (5, 100), (8, 256)):
        inputs = text_batch(batch, length, seed=length, vocab=VOCABULARY)
        got = dict(
            zip((o.name for o in session.get_outputs()), session.run(None, {k: v.numpy() for k, v in inputs.items()}))
        )
        with torch.no_grad():
            want = module(**inputs)
        keep = inputs["attention_mask"].numpy() != 0
        assert np.abs(got["last_hidden_state"] - want["last_hidden_state"].numpy())[keep].max() < 1e-4
        assert np.abs(got["pooler_output"] - want["pooler_output"].numpy()).max() < 1e-4


def test_the_ecosystems_own_loaders_accept_the_folder(artifact):
    assert AutoTokenizer.from_pretrained(artifact.path)("a text")["input_ids"][0] == 101
    assert (artifact.path / "config.json").is_file()
    assert (artifact.path / "modules.json").is_file()
