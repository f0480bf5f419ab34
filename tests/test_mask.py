"""Gates: multiplying by 0 or 1 where a group is contracted."""

import torch

from checks import bert_graph, groups_of, mlp_graph, random_plan, text_batch
from tilecut_passes.axes.axis import Axis, concat, product
from tilecut_passes.mask import Mask, gate, unit_of
from tilecut_passes.run_passes import largest_error, run_passes


def test_gates_set_to_a_plan_equal_its_mask():
    graph = bert_graph()
    kinds = ("heads", "neurons", "vo_width")
    plan = random_plan(graph, 4, *kinds)
    masked = graph.copy()
    assert run_passes(masked, [Mask(plan)])[0].rewrites > 0
    gated = gate(graph, [g.name for g in plan.groups])
    gates = {g.name: torch.zeros(g.size).index_fill(0, torch.tensor(g.kept), 1.0) for g in plan.groups}
    inputs = text_batch(3, 9)
    assert largest_error(masked.run(inputs), gated.run(inputs, gates)) < 1e-6


def test_open_gates_change_nothing():
    graph = bert_graph()
    gated = gate(graph, [g.name for g in groups_of(graph)])
    inputs = text_batch(2, 7)
    assert largest_error(graph.run(inputs), gated.run(inputs, gated.open_gates())) == 0


def test_a_plan_that_keeps_all_inserts_nothing():
    graph = mlp_graph()
    plan = random_plan(graph, 0).keeping({g.name: range(g.size) for g in groups_of(graph)})
    assert Mask(plan)(graph) == 0


def test_gate_gradients_are_the_derivative_of_the_output():
    graph = mlp_graph()
    (group,) = groups_of(graph)
    gated = gate(graph, [group.name])
    x = {"x": torch.randn(1, 12)}
    gates = gated.open_gates(requires_grad=True)
    (gradient,) = torch.autograd.grad(gated.run(x, gates)["output"].sum(), list(gates.values()))
    hidden = torch.relu(x["x"] @ graph.tensor("up.weight").T + graph.tensor("up.bias"))
    assert torch.allclose(gradient, (hidden * graph.tensor("down.weight").sum(0))[0], atol=1e-5)


def test_unit_of_names_the_unit_of_every_index():
    heads, width, other = Axis(3), Axis(2), Axis(2)
    axis = concat([product([heads, width]), other])
    assert unit_of(axis, heads.root).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert unit_of(axis, width.root).tolist() == [0, 1, 0, 1, 0, 1, 2, 2]
