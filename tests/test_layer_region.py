"""Regions of layers: what is in them, and that alone they compute what they compute in the whole model."""

import functools
import types

import pytest
import torch

from checks import TinyMlp, op_names, randomise
from layer_graphs import graph_of
from tilecut.config import DEFAULT_KINDS
from tilecut.make_cases import make_inputs
from tilecut_passes.axes.groups import find_groups
from tilecut_passes.axes.infer import infer
from tilecut_passes.capture import capture
from tilecut_passes.count_macs import MacCounter
from tilecut_passes.layer_region import describe, find_region, matching_groups, resizing, signature_of
from tilecut_passes.plan import PrunePlan
from tilecut_passes.prune import Prune, as_cut
from tilecut_passes.run_passes import largest_error, run_passes
from tilecut_runtime.errors import VerificationError
from tilecut_targets.edge.time_samples import record


@functools.lru_cache
def parts(name):
    graph = graph_of(name)
    axes = infer(graph)
    every = find_groups(axes)
    groups = [g for g in every if g.kind in DEFAULT_KINDS]
    by_name = {g.name: g for g in groups}
    sets = MacCounter(axes, every, {}).groups_together(list(by_name))
    regions = {tuple(names): find_region(axes, [by_name[n] for n in names]) for names in sets}
    return types.SimpleNamespace(graph=graph, axes=axes, groups=groups, regions=regions)


# sets of groups, and types among them
EXPECTED = {
    "bert": (4, 2),
    "llama_gqa": (4, 2),
    "gpt2": (4, 2),
    "vit": (4, 2),
    "falcon_mqa": (4, 2),
    "albert": (2, 2),
    "encoder": (4, 4),
    "mlp": (1, 1),
    "gated": (1, 1),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_equal_layers_are_of_one_type(name):
    regions = parts(name).regions
    assert (len(regions), len({r.signature for r in regions.values()})) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_region_alone_computes_what_it_computes_inside(name):
    found = parts(name)
    for batch, length in ((1, 5), (3, 8)):
        inputs = make_inputs(found.graph, batch, length, seed=1)
        for region in found.regions.values():
            names = {*region.graph.inputs, *region.graph.outputs}
            values = record(found.graph, inputs, names)
            got = region.graph.run({n: values[n] for n in region.graph.inputs})
            assert got and all(torch.equal(x, values[n]) for n, x in got.items())


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gpt2", "falcon_mqa", "albert", "gated"])
def test_a_region_that_is_cut_computes_what_it_computes_in_the_model_that_is_cut(name):
    found = parts(name)
    counts = {g.name: max(g.size * 2 // 3, 1) for g in found.groups}
    whole = found.graph.copy()
    plan = resizing(found.graph, found.groups, list(counts.values()))
    run_passes(whole, [Prune(plan)])
    inputs = as_cut(found.graph, plan)(make_inputs(found.graph, 2, 6, seed=2))
    for names, region in found.regions.items():
        small = region.graph.copy()
        run_passes(small, [Prune(resizing(region.graph, region.groups, [counts[n] for n in names]))])
        values = record(whole, inputs, {*small.inputs, *small.outputs})
        got = small.run({n: values[n] for n in small.inputs})
        assert largest_error({n: values[n] for n in got}, got) < 1e-6


def test_what_a_region_holds():
    regions = parts("bert").regions
    ops = {names[0].rpartition(":")[2]: op_names(region.graph) for names, region in regions.items()}
    assert ops["neurons"] == "linear gelu linear"
    # The mask comes along, because fusion reads its meaning; the projections end at the sink.
    assert "ne scalar" in ops["heads"].lower() or "arange" in ops["heads"]
    assert ops["heads"].endswith(
        "linear reshape transpose linear reshape transpose linear reshape transpose "
        "scaled_dot_product_attention transpose reshape linear"
    )
    first = next(r for names, r in regions.items() if "layer.0" in names[0] and names[0].endswith("neurons"))
    assert first.graph.inputs == ("layer_norm_1",) and len(first.graph.outputs) == 1


def test_shared_layers_have_one_region_with_every_use():
    (heads, neurons) = parts("albert").regions.values()
    assert op_names(neurons.graph).count("linear") == 4 and len(neurons.graph.outputs) == 2
    assert op_names(heads.graph).count("scaled_dot_product_attention") == 2


def test_a_signature_sees_shapes_literals_and_ops_but_no_names_or_numbers():
    one = capture(randomise(TinyMlp(), 0), torch.randn(4, 12))
    assert signature_of(one) == signature_of(capture(randomise(TinyMlp(), 1), torch.randn(4, 12)))
    assert signature_of(one) != signature_of(capture(randomise(TinyMlp(neurons=24)), torch.randn(4, 12)))
    assert signature_of(one) != signature_of(one, ["more"])

    class Scaled(TinyMlp):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return super().forward(x) * self.by

    two, three = (capture(randomise(Scaled(by)), torch.randn(4, 12)) for by in (2.0, 3.0))
    assert signature_of(two) != signature_of(three)
    assert len([line for line in describe(two) if "get_attr" in line]) == 4


def test_a_plan_that_resizes_keeps_the_first_units_and_pads():
    graph = graph_of("mlp")
    groups = parts("mlp").groups
    for count in (3, 20, 32):
        small = graph.copy()
        run_passes(small, [Prune(resizing(graph, groups, [count]))])
        assert small.tensor("up.weight").shape == (count, 12)
        kept = min(count, 20)
        assert torch.equal(small.tensor("up.weight")[:kept], graph.tensor("up.weight")[:kept])
        assert not small.tensor("up.weight")[kept:].any()
    assert resizing(graph, groups, [20]) == PrunePlan.keep_all(graph, groups)


def test_groups_of_another_graph_are_not_matched():
    with pytest.raises(VerificationError, match="is not one group of its own region"):
        matching_groups(graph_of("mlp"), parts("gated").groups)
