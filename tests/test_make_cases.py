import numpy as np
import torch

from checks import bert_graph, mlp_graph
from tilecut.make_cases import SIZES, make_case, make_cases, make_inputs


def test_inputs_cover_the_vocabulary_and_are_ragged():
    inputs = make_inputs(bert_graph(), 8, 64, seed=0)
    assert inputs["input_ids"].shape == (8, 64)
    assert 90 < int(inputs["input_ids"].max()) < 99
    assert set(inputs["token_type_ids"].unique().tolist()) == {0, 1}
    lengths = inputs["attention_mask"].sum(1)
    assert lengths[0] == 64 and len(lengths.unique()) > 3
    assert (inputs["attention_mask"].diff(dim=1) <= 0).all()
    assert make_inputs(bert_graph(), 2, 9, seed=0, ragged=False)["attention_mask"].min() == 1


def test_lengths_stop_at_what_the_model_allows():
    assert make_inputs(bert_graph(), 1, 9999, seed=0)["input_ids"].shape == (1, 512)


def test_cases_hold_the_graphs_own_outputs():
    graph = bert_graph()
    cases = make_cases(graph)
    assert [c.inputs["input_ids"].shape for c in cases] == [tuple(s) for s in SIZES]
    for case in cases:
        want = graph.run({k: torch.from_numpy(v) for k, v in case.inputs.items()})
        assert case.error({k: v.numpy() for k, v in want.items()}) == 0.0


def test_a_case_ignores_padding_and_nothing_else():
    graph = bert_graph()
    inputs = make_inputs(graph, 3, 12, seed=3)
    outputs = graph.run(inputs)
    case = make_case(inputs, outputs)
    padded = inputs["attention_mask"] == 0
    assert padded.any()
    other = {k: v.detach().clone() for k, v in outputs.items()}
    other["last_hidden_state"][padded] = 1e6
    assert case.error({k: v.numpy() for k, v in other.items()}) == 0.0
    other["last_hidden_state"][0, 0] += 1.0
    assert case.error({k: v.numpy() for k, v in other.items()}) > 1e-2


def test_sizes_that_come_out_the_same_are_one_case():
    assert len(make_cases(mlp_graph(), sizes=((2, 5), (2, 7), (3, 1)))) == 2
    assert make_cases(mlp_graph())[0].inputs["x"].dtype == np.float32
