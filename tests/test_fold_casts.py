"""Casts of weights, made at compile time."""

import torch

from checks import encoder_graph, mlp_graph, op_names
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.compute_in import ComputeIn
from tilecut_targets.fold_casts import FoldCasts


def test_before_and_after():
    graph = mlp_graph().copy()
    run_passes(graph, [ComputeIn(torch.float16)])
    assert op_names(graph).split().count("to") == 6
    assert run_passes(graph, [FoldCasts()])[0].rewrites == 4
    # Those of the input and of the output are left.
    assert op_names(graph).split().count("to") == 2
    assert {t.dtype for t in graph.tensors.values()} == {torch.float16}
    assert all(name.endswith("_float16") for name in graph.tensors)
    assert FoldCasts()(graph) == 0


def test_numbers_are_the_same_bit_for_bit_and_the_dense_graph_keeps_its_own():
    dense = encoder_graph()
    graph = dense.copy()
    run_passes(graph, [ComputeIn(torch.float16)])
    folded = graph.copy()
    run_passes(folded, [FoldCasts()])
    given = {name: torch.ones(2, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    assert largest_error(graph.run(given), folded.run(given)) == 0
    assert {t.dtype for t in dense.tensors.values()} == {torch.float32}
    # Norms and tables are read in float32.
    assert folded.tensors["norms.0.weight"].dtype == torch.float32
    assert folded.tensors["q.0.weight_float16"].dtype == torch.float16
