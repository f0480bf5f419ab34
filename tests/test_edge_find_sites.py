"""The places of a graph that a form is chosen for: what each holds, and that it computes what the graph does there."""

import pytest
import torch

from checks import bert_graph, encoder_graph, mlp_graph, op_names
from norm_models import llama
from tilecut.make_cases import make_inputs
from tilecut_passes.capture import capture
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.edge.find_sites import find_sites
from tilecut_targets.edge.forms import FORMS
from tilecut_targets.edge.target import EdgeTarget
from tilecut_targets.edge.time_samples import record

# Whose sites they are: an encoder's, a decoder's, or both's.
ENCODER, DECODER = ("residual", "attention", "gelu"), ("residual", "norm", "rotary", "qkv", "other_attention", "gate")


def llama_graph():
    return capture(llama())


def fused(graph):
    made = graph.copy()
    run_passes(made, EdgeTarget().fusing)
    return made


def test_what_a_site_holds():
    graph = fused(encoder_graph())
    sites = {kind: [op_names(site) for site in find_sites(graph, kind)] for kind in FORMS}
    projections = "linear reshape transpose"
    assert len(sites["attention"]) == 2
    assert sites["attention"][0].split().count("linear") == 3 and sites["attention"][0].endswith("attention transpose reshape")
    assert projections.split()[0] in sites["attention"][0]
    assert sites["gelu"] == ["linear gelu"] * 2
    assert sites["residual"] == ["add layer_norm"] * 4
    assert [kind for kind in FORMS if sites[kind]] == list(ENCODER)


def test_what_a_site_of_a_decoder_holds():
    graph = fused(llama_graph())
    sites = {kind: [op_names(site) for site in find_sites(graph, kind)] for kind in FORMS}
    assert [kind for kind in FORMS if sites[kind]] == list(DECODER)
    assert sites["residual"] == ["add rms_norm"] * 4 and sites["norm"] == ["rms_norm"] * 5
    assert len(sites["rotary"]) == 4 and all(one.startswith("cat cos") and one.endswith("rotary") for one in sites["rotary"])
    (attention, _) = sites["other_attention"]
    assert [attention.split().count(op) for op in ("linear", "cat", "rotary", "attention")] == [3, 1, 2, 1]
    (qkv, _) = sites["qkv"]
    assert [qkv.split().count(op) for op in ("linear", "cat", "rotary", "attention")] == [3, 1, 2, 1]
    assert sites["gate"] == ["linear silu linear mul"] * 2


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        *((make, kind) for make in (encoder_graph, bert_graph) for kind in ENCODER),
        *((llama_graph, kind) for kind in DECODER),
    ],
)
def test_a_site_computes_what_the_graph_does_there(make, kind):
    graph = fused(make())
    given = make_inputs(graph, 2, 7, seed=1, ragged=True)
    sites = list(find_sites(graph, kind))
    assert sites
    for site in sites:
        values = record(graph, given, {*site.inputs, *site.outputs})
        got = site.run({name: values[name] for name in site.inputs})
        assert largest_error(got, {name: values[name] for name in site.outputs}) < 1e-5


def test_a_graph_without_a_kind_has_no_site():
    graph = mlp_graph()
    assert [list(find_sites(graph, kind)) for kind in ("attention", "residual")] == [[], []]


def test_the_graph_is_left_alone():
    graph = fused(encoder_graph())
    before = op_names(graph)
    for kind in FORMS:
        list(find_sites(graph, kind))
    assert op_names(graph) == before
    assert torch.equal(graph.tensors["embed.weight"], encoder_graph().tensors["embed.weight"])
