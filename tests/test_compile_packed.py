"""A model pruned by half takes packed texts, compiled for cuda as sequences and for edge as a mask."""

import numpy as np
import pytest
import torch

from checks import randomise
from test_pack_segments import DENSE, MODELS, PACKED, ROWS, texts
from tilecut import PruneConfig, compile_pruned, load
from tilecut_runtime.torch_program import WEIGHTS, read_program

WHY = "mask kept as a tensor: packed segments of position_ids x causal"


@pytest.fixture(scope="module")
def llama():
    return randomise(MODELS["llama"]({}))


@pytest.fixture(scope="module")
def compiled(llama, tmp_path_factory):
    config = PruneConfig(sparsity=0.5, block=1)
    return {
        target: compile_pruned(
            llama,
            target,
            texts([[6, 5], [6, 5]]),
            [texts([[3, 1, 8], [12], [5, 7]])],
            config,
            tmp_path_factory.mktemp(target) / "artifact",
            measure=False,
        )
        for target in ("cuda", "edge")
    }


def run(session, given):
    return session.run({name: x.numpy() for name, x in given.items()})["logits"]


@pytest.mark.parametrize("target", ["cuda", "edge"])
def test_packed_texts_give_what_the_pruned_model_gives_them_alone(compiled, target):
    session, module = load(compiled[target].path, device="cpu"), compiled[target].module()
    for rows in ROWS:
        given = texts(rows)
        got = run(session, given)
        with torch.no_grad():
            np.testing.assert_allclose(got, module(**given)["logits"].numpy(), atol=1e-4)
        for b, lengths in enumerate(rows):
            parts = zip(given["input_ids"][b].split(lengths), given["position_ids"][b].split(lengths))
            alone = [run(session, {"input_ids": ids[None], "position_ids": places[None]})[0] for ids, places in parts]
            np.testing.assert_allclose(got[b], np.concatenate(alone), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_packed_texts_run_on_the_gpu(compiled):
    there, here = (load(compiled["cuda"].path, device=device) for device in (None, "cpu"))
    for rows in ROWS:
        np.testing.assert_allclose(run(there, texts(rows)), run(here, texts(rows)), atol=1e-2)


def test_the_model_is_half_as_large(compiled):
    for artifact in compiled.values():
        heads = [g for g in artifact.plan.groups if g.kind in ("heads", "kv_groups", "neurons")]
        assert any(len(g.kept) < g.size for g in heads)
        assert all(r.status == "passed" for r in artifact.manifest.verification if r.status != "not run")


def test_cuda_calls_the_packed_op_and_edge_keeps_the_mask(compiled):
    cuda, edge = compiled["cuda"], compiled["edge"]
    program = read_program(cuda.path / "model.pt2", cuda.path / WEIGHTS)
    called = [n.target for n in program.graph.nodes]
    assert called.count(PACKED) == 2 and called.count(DENSE) == 0
    assert WHY not in str(cuda.report) and WHY in str(edge.report)
