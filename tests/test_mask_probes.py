"""Probes of masks: what is in a cone, which sizes and inputs are tried, and how values are found without the model."""

import pytest
import torch

from test_recognize_mask import SDPA, attending, ramp, tril
from tilecut_passes.graph import sizes_of, source, value_of
from tilecut_passes.mask_probes import LARGE, Evaluation, ProbeError, cone_of, literals_of, make_probes, unprobeable

MAKES = (
    lambda self, mask, s: tril(s).triu(-20) & (mask != 7)[:, None, None, :],
    lambda self, mask, s: (ramp(s)[:, None] - ramp(s)).abs() < 3000,
    lambda self, mask, s: (self.qkv.weight[0, 0] + self.qkv.weight.new_zeros(s, s))[None, None],
)


def cone(number):
    graph = attending(*MAKES)
    node = [n for n in graph.nodes if n.target is SDPA][number]
    pairs = [sizes_of(value_of(source(node, i)))[-2] for i in (0, 1)]
    return graph, node.args[3], cone_of(node.args[3]), pairs


def probes(number, shrink=True, heads=1):
    graph, mask, nodes, pairs = cone(number)
    return [[Evaluation(graph, p) for p in group] for group in make_probes(graph, nodes, pairs, heads, shrink)], mask


def lengths(groups, mask):
    return [group[0](mask).shape[-1] for group in groups]


def test_a_cone_ends_at_sizes():
    graph, _, nodes, _ = cone(0)
    assert [n.name for n in nodes if n.op == "placeholder"] == ["mask"]
    assert literals_of(nodes) == {20, 7}
    assert unprobeable(graph, nodes) is None


def test_sizes_straddle_every_literal():
    groups, mask = probes(0)
    found = lengths(groups, mask)
    assert min(found) == 1 and any(20 < n < 40 for n in found) and any(n > 40 for n in found)
    styles = {style for group in groups for one in group for style in one.probe.styles}
    assert {"ones", "left", "right", "holes", "zeros", "packed", "values"} <= styles
    values = torch.cat(
        [one.probe.inputs["mask"].flatten() for g in groups for one in g if "values" in one.probe.styles]
    )
    assert {6, 7, 8, 19, 20, 21, -1, 0, 1} <= set(values.tolist())


def test_large_literals_are_shrunk_and_seen_once_at_their_size():
    groups, mask = probes(1)
    assert {tuple(one.probe.literals) for group in groups for one in group} == {(3000,), ()}
    shown = {n: 2 * n - 1 for n in {one.probe.literals.get(3000, 3000) for g in groups for one in g}}
    assert len(shown) == 4 and LARGE < 3000
    (real,) = [one for group in groups for one in group if not one.probe.literals]
    seen = real(mask)
    assert 3003 <= seen.shape[-1] < 3010 and not seen[0, 3000] and seen[0, 2999]
    small = next(one for group in groups for one in group if one.probe.literals.get(3000) == 4)
    assert int(small(mask).sum(-1).max()) == min(7, small(mask).shape[-1])


def test_without_shrinking_a_literal_may_be_too_large():
    with pytest.raises(ProbeError, match="its literal 3000 is too large to probe"):
        probes(1, shrink=False, heads=32)


def test_weights_are_random_and_differ_by_probe():
    groups, mask = probes(2)
    values = {float(one(mask).flatten()[0]) for group in groups for one in group}
    weight = float(attending(*MAKES).tensor("qkv.weight")[0, 0])
    assert len(values) == sum(len(group) for group in groups) and weight not in values


def test_probes_are_bounded_by_the_number_of_scores():
    groups, mask = probes(0, heads=512)
    assert 128 <= max(lengths(groups, mask)) < 135


def test_an_activation_cannot_be_probed():
    graph = attending(*MAKES)
    node = next(n for n in graph.nodes if n.target is SDPA)
    assert "depends on activations" in str(unprobeable(graph, cone_of(source(node))))
    one = probes(0)[0][0][0]
    with pytest.raises(ProbeError, match="it depends on the input x"):
        one(source(node))
