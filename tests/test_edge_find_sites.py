"""The places of a graph that a form is chosen for: what each holds, and that it computes what the graph does there."""

import pytest
import torch

from checks import bert_graph, encoder_graph, mlp_graph, op_names, text_batch
from tilecut_passes.fuse_attention import FuseAttention
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_targets.edge.find_sites import find_sites
from tilecut_targets.edge.forms import FORMS
from tilecut_targets.edge.time_samples import record


def fused(graph):
    made = graph.copy()
    run_passes(made, [FuseAttention()])
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


@pytest.mark.parametrize("kind", list(FORMS))
@pytest.mark.parametrize("make", [encoder_graph, bert_graph])
def test_a_site_computes_what_the_graph_does_there(make, kind):
    graph = fused(make())
    given = {name: x for name, x in text_batch(2, 7, vocab=50).items() if name in graph.inputs}
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
